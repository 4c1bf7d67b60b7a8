#!/usr/bin/env python3
"""What one request can do to the streams of others: each parameter at its limit, and their largest gap meanwhile.

Steady streams run all the time. For each case they are watched for some seconds without it, which gives the median gap
between their tokens; then the request of the case is sent, and the largest gap until it is answered (or given up) must
not be above twice that median plus 50 ms. Requests are built before, and sent by a thread that does nothing else.

    python benchmarks/benchmark_limits.py                                  # all cases on the default model
    python benchmarks/benchmark_limits.py --only bad_words stop --seconds 5
    python benchmarks/benchmark_limits.py --paced-engine 50                # the API process alone
    python benchmarks/benchmark_limits.py --out result.json -- --dtype bfloat16 --max-num-batched-tokens 256
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import http.client
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import benchmark_front
import uvloop

from chat_load import WORDS, BenchmarkError, markdown_table, positive_int, say
from machine_facts import machine
from server_process import ServerProcess

_ALLOWED_MS = 50.0
# Streams go on for so long behind an answer: what a request leaves to be done counts as well.
_AFTER_S = 0.5


class Server(NamedTuple):
    """What cases depend on.

    Attributes:
        max_model_len: Longest prompt and answer together, in tokens.
        vocab_size: Token ids are below it.
    """

    model: str
    max_model_len: int
    vocab_size: int


class Request(NamedTuple):
    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One case. Times are in milliseconds, but for `seconds`, which the request took.

    Attributes:
        status: HTTP status of the answer; None if none had come when the case was given up.
        limit: What the largest gap may be.
        message: What the server says where it refuses the request.
    """

    case: str
    status: int | None
    seconds: float
    median: float
    limit: float
    largest: float
    message: str

    @property
    def holds(self) -> bool:
        return self.largest <= self.limit


def chat(**fields: Any) -> Request:
    user = {"role": "user", "content": "Tell me of the sea."}
    return Request("/v1/chat/completions", {"messages": [user], "max_tokens": 32, "ignore_eos": True} | fields)


def completion(**fields: Any) -> Request:
    return Request("/v1/completions", {"prompt": "The sea", "max_tokens": 32, "ignore_eos": True} | fields)


def words(count: int, start: int = 0) -> str:
    """Text of `count` words, each a token or little more; another start is another text."""
    return f"{start} notes: " + " ".join(
        itertools.islice(itertools.cycle(WORDS.split()), start % 60, start % 60 + count)
    )


def numbered(count: int, length: int) -> list[str]:
    """So many different texts of equal length, which look like each other up to their ends."""
    return [("ab" * length)[: length - 6] + f"{i:06d}" for i in range(count)]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def tool(number: int, num_properties: int) -> dict[str, Any]:
    properties = {f"field_{number}_{i}": {"type": "string", "description": words(12, i)} for i in range(num_properties)}
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:8]}
    return {"type": "function", "function": {"name": f"tool_{number}", "parameters": parameters}}


def everything(server: Server, n: int) -> dict[str, Any]:
    """All that the sampler does for a request, `n` times, within the limits of the product."""
    share = 262_144 // n // 2
    return {
        "n": n,
        "bad_words": [f"w{i}" for i in range(min(128, share // 8))],
        "logit_bias": {str(i): 1 for i in range(min(1024, share // 4))},
        "stop_token_ids": list(range(100, 100 + min(1024, share // 4))),
        "allowed_token_ids": list(range(min(server.vocab_size, share // 4))),
        "stop": numbered(min(256, 8192 // n), 1000),
        "logprobs": True,
        "top_logprobs": min(20, 500 // n),
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "seed": 1,
        "min_tokens": 8,
    }


def cases(server: Server) -> dict[str, Callable[[], Request]]:
    """Each case by name; requests are long, so each is made when its turn comes."""
    length, vocab = server.max_model_len, server.vocab_size
    ids = list(range(100, 100 + length - 40))
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4000)}}
    deep = {"type": "object", "properties": {"a": nested(100)}}

    def form(**fields: Any) -> Callable[[], Request]:
        return lambda: chat(structured_outputs=fields)

    return {
        "nothing special": chat,
        "bad_words, 256 short": lambda: chat(bad_words=[f"w{i}" for i in range(256)]),
        "bad_words, long, too many tokens": lambda: chat(bad_words=numbered(256, 1024)),
        "bad_words, 64 of 120,000 characters": lambda: chat(bad_words=numbered(64, 120_000)),
        "bad_words, 128 with n 64": lambda: chat(n=64, bad_words=[f"w{i}" for i in range(128)]),
        "stop, 256 of 1,024 characters": lambda: chat(stop=numbered(256, 1024)),
        "stop, 2,048": lambda: chat(stop=numbered(2048, 100)),
        "stop, 64 of 1,024 with n 128": lambda: chat(n=128, stop=numbered(64, 1024)),
        "stop_token_ids, 1,024 with n 64": lambda: chat(n=64, stop_token_ids=list(range(200, 1224)), min_tokens=32),
        "logit_bias, 1,024": lambda: chat(logit_bias={str(i): 1 for i in range(1024)}),
        "logit_bias, 60,000": lambda: chat(logit_bias={str(i): 1 for i in range(60_000)}),
        "logit_bias, 1,024 with n 128": lambda: chat(n=128, logit_bias={str(i): 1 for i in range(1024)}),
        "allowed_token_ids, all": lambda: chat(allowed_token_ids=list(range(vocab))),
        "allowed_token_ids, 520,000": lambda: chat(allowed_token_ids=[5] * 520_000),
        "n 128": lambda: chat(n=128),
        "n 128, streamed": lambda: chat(n=128, stream=True),
        "best_of 128": lambda: completion(best_of=128, n=1),
        "logprobs 20": lambda: chat(logprobs=True, top_logprobs=20),
        "logprobs 20 with n 25": lambda: chat(logprobs=True, top_logprobs=20, n=25),
        "logprobs 20 with n 25, streamed": lambda: chat(logprobs=True, top_logprobs=20, n=25, stream=True),
        "prompt_logprobs 20, long prompt": lambda: completion(prompt=ids, prompt_logprobs=20, max_tokens=2),
        "prompt_logprobs 20 in a chat": lambda: chat(
            messages=[{"role": "user", "content": words(length * 3 // 4)}], prompt_logprobs=20, max_tokens=2
        ),
        "echo with logprobs, long prompt": lambda: completion(prompt=ids, echo=True, logprobs=20, max_tokens=2),
        "beam search of 9": lambda: completion(use_beam_search=True, n=9),
        "penalties, seed, top_p, n 128": lambda: chat(
            n=128, presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=1.2, seed=1, top_p=0.9, top_k=50
        ),
        "everything with n 1": lambda: chat(**everything(server, 1)),
        "everything with n 16": lambda: chat(**everything(server, 16)),
        "everything with n 128": lambda: chat(**everything(server, 128)),
        "everything with n 128, streamed": lambda: chat(**everything(server, 128), stream=True),
        "longest prompt, ids": lambda: completion(prompt=ids, max_tokens=2),
        "longest prompt, a new system prompt": lambda: chat(
            messages=[
                {"role": "system", "content": words(length * 3 // 4, int(time.time()))},
                {"role": "user", "content": "Hello"},
            ],
            max_tokens=2,
        ),
        "prompt of 4,000,000 characters": lambda: chat(messages=[{"role": "user", "content": "word " * 799_000}]),
        "prompt of one long word": lambda: completion(prompt="x" * (length * 8)),
        "prompt of 520,000 ids": lambda: completion(prompt=[5] * 520_000),
        "1,024 prompts": lambda: completion(prompt=[f"The sea {i}" for i in range(1024)], max_tokens=1),
        "512 prompts of 1,000 ids": lambda: completion(prompt=[[5 + i] * 1000 for i in range(512)], max_tokens=1),
        "1,024 prompts of 900 ids": lambda: completion(prompt=[[5 + i] * 900 for i in range(1024)], max_tokens=1),
        "13,000 messages": lambda: chat(
            messages=[{"role": ("user", "assistant")[i % 2], "content": "x"} for i in range(12_999)]
        ),
        "10,000 system messages": lambda: chat(
            messages=[
                *({"role": "system", "content": f"{i}"} for i in range(10_000)),
                {"role": "user", "content": "Hello"},
            ]
        ),
        "13,000 text parts": lambda: chat(
            messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 13_000}]
        ),
        "control tokens spelled 100,000 times": lambda: chat(
            messages=[{"role": "user", "content": "<|im_end|>" * 100_000}]
        ),
        "tools, 1,024": lambda: chat(tools=[tool(i, 8) for i in range(1024)], tool_choice="none"),
        "tools, 8,000 without parameters": lambda: chat(
            tools=[{"type": "function", "function": {"name": f"tool_{i}"}} for i in range(8_000)], tool_choice="none"
        ),
        "tools, 64 that are required": lambda: chat(tools=[tool(i, 20) for i in range(64)], tool_choice="required"),
        "JSON schema of 4,000 properties": form(json=schema),
        "JSON schema, deep": form(json=deep),
        "regex, slow": form(regex="((a|aa|aaa|[a-z]{1,50}){1,40}){1,40}"),
        "regex, long": form(regex="|".join(numbered(200, 1000))),
        "grammar, slow": form(grammar="root ::= a\n" + "\n".join(f"a{i} ::= (a{i + 1} a{i + 1})" for i in range(20))),
        "grammar, long": form(grammar="root ::= " + " | ".join(f'"{text}"' for text in numbered(200, 1000))),
        "choice of 10,000": form(choice=[f"choice {i}" for i in range(10_000)]),
        "choice with n 128": lambda: chat(n=128, structured_outputs={"choice": numbered(100, 200)}),
        "JSON object with n 128": lambda: chat(n=128, response_format={"type": "json_object"}),
        "structural tag": lambda: chat(
            response_format={
                "type": "structural_tag",
                "structures": [{"begin": f"<f{i}>", "schema": tool(i, 4), "end": "</f>"} for i in range(200)],
                "triggers": ["<f"],
            }
        ),
        "metadata, a text of 15 MiB": lambda: chat(metadata={"note": "x" * (15 * 2**20)}),
        "metadata, 520,000 numbers": lambda: chat(metadata=list(range(520_000))),
        "metadata, 520,000 numbers of twenty digits": lambda: chat(
            metadata={"numbers": [1e-5 * i + 1.2345678901234567 for i in range(520_000)]}
        ),
        "metadata, a text of 2,000,000 escapes": lambda: chat(metadata={"note": "é" * 2_000_000}),
        "metadata, 32,000 objects": lambda: chat(metadata=[{"a": 1}] * 32_000),
        "metadata, 65,000 keys": lambda: chat(metadata={f"key{i}": 1 for i in range(65_000)}),
        "metadata, too many objects": lambda: chat(metadata=[{}] * 10_000_000),
        "60,000 unknown fields": lambda: chat(**{f"field{i}": 1 for i in range(60_000)}),
        "1,000 unknown fields": lambda: chat(**{f"field{i}": 1 for i in range(1000)}),
        "chat_template_kwargs of 64 KiB": lambda: chat(chat_template_kwargs={"note": "x" * 65_000}),
        "Messages API, 12,000 blocks": lambda: Request(
            "/v1/messages",
            {
                "max_tokens": 8,
                "system": [{"type": "text", "text": f"Rule {i}."} for i in range(400)],
                "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 12_000}],
            },
        ),
        "Responses API, 12,000 items": lambda: Request(
            "/v1/responses",
            {"max_output_tokens": 16, "input": [{"role": "user", "content": "x"}] * 12_000, "truncation": "auto"},
        ),
        "tokenize, 3,900,000 characters": lambda: Request("/tokenize", {"prompt": "word " * 780_000}),
        "tokenize with strings": lambda: Request("/tokenize", {"prompt": "word " * 200_000, "return_token_strs": True}),
        "detokenize, 520,000": lambda: Request("/detokenize", {"tokens": [500] * 520_000}),
        "a text of 15 MiB that looks like JSON": lambda: completion(prompt='"\\,[{' * (2 * 2**20)),
    }


class Stream(asyncio.Protocol):
    """A streamed answer; notes when each of its tokens came, at the least cost."""

    def __init__(self, request: bytes, ended: Callable[[], None]) -> None:
        self.arrivals: list[float] = []
        self.head = b""
        self._request = request
        self._ended = ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.head:
            self.head = data
        if b"data: {" in data:
            self.arrivals.append(now)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended()


class SteadyStreams:
    """Keeps so many streams running; each that ends is followed by another one."""

    def __init__(self, server: ServerProcess, count: int, num_tokens: int) -> None:
        body = {
            "model": server.model,
            "prompt": words(60),
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        content = json.dumps(body).encode()
        self._request = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        ).encode() + content
        self._port = server.port
        self._streams: list[Stream] = []
        self._tasks = [asyncio.create_task(self._run(i * num_tokens // count)) for i in range(count)]

    async def _run(self, offset: int) -> None:
        # Not all at a time, so that some are always in the middle of their answer.
        await asyncio.sleep(offset * 0.002)
        loop = asyncio.get_running_loop()
        while True:
            ended = asyncio.Event()
            stream = Stream(self._request, ended.set)
            await loop.create_connection(lambda stream=stream: stream, "127.0.0.1", self._port)  # type: ignore[misc]
            self._streams.append(stream)
            await ended.wait()
            if not stream.head.startswith(b"HTTP/1.1 200"):
                raise BenchmarkError(f"a steady stream failed: {stream.head[:300]!r}")

    async def wait_for_tokens(self) -> None:
        """Returns when all streams have begun."""
        while sum(len(stream.arrivals) > 3 for stream in self._streams) < len(self._tasks):
            self._raise_failure()
            await asyncio.sleep(0.05)

    async def settle(self, most: float) -> None:
        """Returns when all streams get tokens again after a request that was given up, at most `most` seconds later."""
        deadline = time.perf_counter() + most
        while time.perf_counter() < deadline:
            begin = time.perf_counter()
            await asyncio.sleep(0.3)
            recent = [sum(at >= begin for at in stream.arrivals) for stream in self._streams]
            if sum(count >= 3 for count in recent) >= len(self._tasks) - 1:
                return

    def gaps(self, begin: float, end: float) -> list[float]:
        """Milliseconds between one token of a stream and its next, of gaps that touch [begin, end]."""
        self._raise_failure()
        return [
            (later - earlier) * 1000
            for stream in self._streams
            for earlier, later in itertools.pairwise(stream.arrivals)
            if later >= begin and earlier <= end
        ]

    def forget(self) -> None:
        """Drops what was seen of streams that have ended."""
        self._streams = self._streams[-2 * len(self._tasks) :]

    def _raise_failure(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def send(port: int, path: str, content: bytes, timeout: float) -> tuple[int | None, str]:
    """Status and message of the answer; no status if it has not come whole within `timeout` seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    deadline = time.perf_counter() + timeout
    try:
        # The server may answer, and close, before it has read a body that it does not want.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = b""
        while part := answer.read(2**18):
            text = text or part
            if time.perf_counter() > deadline:
                return None, ""
    except (TimeoutError, OSError, http.client.HTTPException):
        return None, ""
    finally:
        connection.close()
    return answer.status, "" if answer.status == 200 else _message(text)


def _message(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer[:100].decode(errors="replace")


async def measure(args: argparse.Namespace, folder: Path) -> list[Result]:
    """Starts the server and runs the cases one after the other."""
    flags = ["--disable-uvicorn-access-log", *(["--model", args.model] if args.model else []), *args.server_flags]
    if args.paced_engine is None:
        server = ServerProcess(flags, folder / "log")
    else:
        role = [benchmark_front.__file__, "front", str(args.paced_engine), str(folder / "times"), ""]
        server = ServerProcess(flags, folder / "log", command=[sys.executable, *role])
    try:
        server.wait_until_healthy(600)
        known = cases(_facts(server))
        chosen = {name: make for name, make in known.items() if _is_chosen(name, args.only)}
        if not chosen:
            raise BenchmarkError(f"no case has {' or '.join(args.only)} in its name; there are {', '.join(known)}")
        streams = SteadyStreams(server, args.streams, args.tokens)
        try:
            await streams.wait_for_tokens()
            return [await run_case(server, streams, name, make, args) for name, make in chosen.items()]
        finally:
            await streams.stop()
    except BaseException:
        print(server.log_tail(), file=sys.stderr)
        raise
    finally:
        server.stop()


def _is_chosen(name: str, only: list[str] | None) -> bool:
    return not only or any(part in name for part in only)


def _facts(server: ServerProcess) -> Server:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/v1/models")
    (card, *_) = json.loads(connection.getresponse().read())["data"]
    # A refusal names the limit.
    content = json.dumps({"prompt": "x", "max_tokens": 1, "stop_token_ids": [2**31 - 1]}).encode()
    _, message = send(server.port, "/v1/completions", content, 60)
    return Server(card["id"], int(card["max_model_len"]), int(message.rstrip(".").rpartition(" ")[2]) + 1)


async def run_case(
    server: ServerProcess, streams: SteadyStreams, name: str, make: Callable[[], Request], args: argparse.Namespace
) -> Result:
    request = make()
    path, content = request.path, json.dumps(request.body).encode()
    del request
    gc.collect()
    streams.forget()
    await streams.settle(args.settle)
    quiet = time.perf_counter()
    await asyncio.sleep(args.seconds)
    begin = time.perf_counter()
    median = statistics.median(streams.gaps(quiet, begin) or [args.seconds * 1000])
    status, message = await asyncio.to_thread(send, server.port, path, content, args.give_up)
    end = time.perf_counter()
    await asyncio.sleep(_AFTER_S + 2 * median / 1000)
    if server.process.poll() is not None:
        raise BenchmarkError(f"the server ended in the case {name!r}")
    result = Result(
        case=name,
        status=status,
        seconds=end - begin,
        median=median,
        limit=2 * median + _ALLOWED_MS,
        largest=max(streams.gaps(begin, end + _AFTER_S), default=(end - quiet) * 1000),
        message=message,
    )
    held = "" if result.holds else f" > {result.limit:.0f}"
    say(f"{name}: {status} in {result.seconds:.2f} s, largest gap {result.largest:.0f} ms{held} {message[:90]}")
    return result


def table(results: list[Result]) -> str:
    def row(r: Result) -> Iterator[object]:
        yield from (r.case, "ok" if r.holds else "TOO LONG", r.status or "-", f"{r.seconds:.2f}")
        yield from (f"{ms:.1f}" for ms in (r.median, r.limit, r.largest))

    head = ["request", "", "status", "seconds", "median gap, ms", "allowed", "largest"]
    return markdown_table([head, *(list(row(r)) for r in results)], num_text_columns=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="what to serve; the default model if not given")
    parser.add_argument("--streams", type=positive_int, default=8, help="steady streams (default: %(default)s)")
    parser.add_argument("--tokens", type=positive_int, default=1000, help="tokens of each (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="how long streams are watched before a case (default: %(default)s)"
    )
    parser.add_argument(
        "--give-up", type=float, default=30.0, help="seconds after which a case is left (default: %(default)s)"
    )
    parser.add_argument(
        "--settle", type=float, default=10.0, help="most seconds between two cases (default: %(default)s)"
    )
    parser.add_argument(
        "--paced-engine",
        type=float,
        metavar="STEPS_PER_S",
        help="put an engine that makes up tokens at this pace in place of the model: what is left is the API process",
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases with one of these in their name")
    parser.add_argument("--out", type=Path, help="write the result to this file as JSON")
    parser.add_argument("server_flags", nargs="*", metavar="-- FLAG", help="flags of the server")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # The client shares the machine with what is measured: its own pauses would look like the server's.
        gc.disable()
        try:
            results = uvloop.run(measure(args, Path(folder)))
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(table(results))
    if args.out is not None:
        arguments = {name: value for name, value in vars(args).items() if name != "out"}
        document = {"machine": machine(), "arguments": arguments, "results": [asdict(result) for result in results]}
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
