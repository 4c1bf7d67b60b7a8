#!/usr/bin/env python3
"""How many JSON schemas are served, what they let through, and what compiling them costs.

Suites are folders of JSON files, which this repository does not hold. A file is one of
    a list of {"schema", "tests": [{"data", "valid"}]}     as the JSON-Schema-Test-Suite has them
    {"schema", "tests"}                                    as JSONSchemaBench has them
    a schema alone                                         which is compiled only

Each schema is compiled as the server does it, in a child with its limits, and the instances of its tests are followed
token by token; properties of an instance are put into the order of the schema first, which outputs are held to.
A valid instance that is turned away is counted apart where it has properties or items that the schema does not name
(objects are closed unless they say otherwise), and where it has a `format` wrong that JSON Schema leaves to readers.

    python benchmarks/benchmark_schemas.py --suite "2020-12=/path/to/tests/draft2020-12" --suite 7=/path/to/tests/draft7
    python benchmarks/benchmark_schemas.py --suite store=/path/to/schemas --tokenizer /path/to/model --out result.json
    python benchmarks/benchmark_schemas.py --suite ... --backend xgrammar
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from chat_load import markdown_table, say
from machine_facts import machine
from vllm.structured_output.compile_server import MAX_CPU_S, MAX_DATA_BYTES, MAX_MEMORY_BYTES
from vllm.structured_output.matcher import TokenMatcher
from vllm.structured_output.messages import Backend
from vllm.structured_output.sources import compile_source
from vllm.structured_output.vocabulary import Vocabulary
from vllm.transformers_utils.default_model import ensure_default_model
from vllm.transformers_utils.tokenizer import Tokenizer, load_tokenizer

_OLD = {"draft3": "draft-03", "draft4": "draft-04", "draft6": "draft-06", "draft7": "draft-07"}
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_VALUES = ("const", "enum", "default", "examples")


@dataclass
class Row:
    """What came of one suite."""

    suite: str
    schemas: int = 0
    served: int = 0
    refused: int = 0
    valid: int = 0
    invalid: int = 0
    valid_rejected: int = 0
    of_these_closed: int = 0
    of_these_format: int = 0
    invalid_accepted: int = 0
    compile_ms_p50: float = 0.0
    compile_ms_p95: float = 0.0
    compile_ms_max: float = 0.0
    engines: dict[str, int] = field(default_factory=dict)
    why_refused: dict[str, int] = field(default_factory=dict)
    wrong: list[dict[str, Any]] = field(default_factory=list)


def groups(folder: Path) -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    """Name, schema and tests of all that a folder holds."""
    paths = sorted(folder.glob("*.json")) if any(folder.glob("*.json")) else sorted(folder.rglob("*.json"))
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(content, dict) and "schema" in content and "tests" in content:
            content = [content]
        if not isinstance(content, list):
            yield path.stem, content, []
            continue
        for group in content:
            schema = group["schema"]
            draft = next((name for key, name in _OLD.items() if key in folder.parts), None)
            if draft is not None and isinstance(schema, dict):
                # What the suite says with its folders.
                schema = {"$schema": f"http://json-schema.org/{draft}/schema#", **schema}
            yield f"{path.stem}: {group.get('description', '')}", schema, group["tests"]


def source(schema: Any) -> bytes:
    form = {"type": "json_schema", "json_schema": schema}
    return json.dumps({"format": form, "after": None, "enforces_all": True}).encode()


def opened(schema: Any) -> Any:
    """A schema whose objects and lists may hold more than it names."""
    if isinstance(schema, list):
        return [opened(child) for child in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: value
        if key in _VALUES
        else {name: opened(child) for name, child in value.items()}
        if key in _SCHEMA_MAPS and isinstance(value, dict)
        else opened(value)
        for key, value in schema.items()
    }
    if made.keys() & {"properties", "patternProperties"} and not made.keys() & {"additionalProperties"}:
        made["additionalProperties"] = True
    if "prefixItems" in made:
        made.setdefault("items", True)
    if isinstance(made.get("items"), list):
        made.setdefault("additionalItems", True)
    return made


def in_order(value: Any, order: dict[str, int]) -> Any:
    if isinstance(value, list):
        return [in_order(item, order) for item in value]
    if not isinstance(value, dict):
        return value
    names = sorted(value, key=lambda name: order.get(name, len(order)))
    return {name: in_order(value[name], order) for name in names}


def names_of(schema: Any) -> dict[str, int]:
    """Where each property is named first: those under `properties`, then those that are only required."""
    named: dict[str, int] = {}
    later: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, list):
            for child in node:
                visit(child)
        elif isinstance(node, dict):
            for key, child in node.items():
                if key == "properties" and isinstance(child, dict):
                    for name in child:
                        named.setdefault(name, len(named))
                elif key in ("required", "dependentRequired", "dependencies"):
                    later.extend(re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(child)))
                if key not in _VALUES:
                    visit(child)

    visit(schema)
    for name in later:
        named.setdefault(json.loads(f'"{name}"'), len(named))
    return named


def follow(grammar: Any, tokens: list[int], stops: list[int], bitmask: np.ndarray) -> bool:
    """Whether an output of these tokens may end."""
    matcher = TokenMatcher(grammar)
    for token in [*tokens, stops[0]]:
        matcher.fill(bitmask, 0)
        if matcher.error or not bitmask[0, token // 32] >> (token % 32) & 1:
            return False
        matcher.accept(token)
    return matcher.ended and matcher.error is None


def judge(
    schema: Any, tests: list[dict[str, Any]], vocabulary: Vocabulary, tokenizer: Tokenizer, backend: Backend
) -> dict[str, Any]:
    """Compiles a schema and tries its tests; in a child."""
    started = time.process_time()
    try:
        compiled = compile_source(source(schema), vocabulary, backend)
    except (ValueError, RuntimeError) as error:
        return {"error": " ".join(str(error).split())[:160]}
    if len(compiled.data) > MAX_DATA_BYTES:
        return {"error": "is too large when compiled"}
    bitmask = np.empty((1, -(-vocabulary.size // 32)), np.int32)
    TokenMatcher(compiled.grammar).fill(bitmask, 0)
    found: dict[str, Any] = {"ms": (time.process_time() - started) * 1000, "engine": compiled.engine, "accepted": []}
    order = names_of(schema)
    for test in tests:
        text = json.dumps(in_order(test["data"], order), ensure_ascii=False)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        found["accepted"].append(follow(compiled.grammar, tokens, vocabulary.stop_token_ids, bitmask))
    return found


def in_child(work: Any) -> dict[str, Any]:
    """What `work()` returns, within the limits that the server has for compiling."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 2)
            spent = int(time.process_time()) + MAX_CPU_S
            resource.setrlimit(resource.RLIMIT_CPU, (spent, spent))
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + MAX_MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            with open(writer, "w") as stream:
                json.dump(work(), stream)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else {"error": "takes too much time or memory"}


def run(name: str, folder: Path, vocabulary: Vocabulary, tokenizer: Tokenizer, backend: Backend) -> Row:
    row, times = Row(name), []
    engines: Counter[str] = Counter()
    why: Counter[str] = Counter()
    for label, schema, tests in groups(folder):
        row.schemas += 1
        found = in_child(lambda schema=schema, tests=tests: judge(schema, tests, vocabulary, tokenizer, backend))
        if "error" in found:
            row.refused += 1
            why[found["error"]] += 1
            continue
        row.served += 1
        engines[found["engine"]] += 1
        times.append(found["ms"])
        for test, accepted in zip(tests, found["accepted"], strict=True):
            row.valid += test["valid"]
            row.invalid += not test["valid"]
            if accepted == test["valid"]:
                continue
            kind = "invalid accepted" if accepted else "valid rejected"
            if accepted:
                row.invalid_accepted += 1
            else:
                row.valid_rejected += 1
                open_one = opened(schema)
                again = in_child(lambda s=open_one, t=test: judge(s, [t], vocabulary, tokenizer, backend))
                if again.get("accepted") == [True]:
                    row.of_these_closed += 1
                    kind += ", closed"
                elif "only an annotation" in test.get("description", ""):
                    row.of_these_format += 1
                    kind += ", format"
            row.wrong.append({"kind": kind, "schema": label, "test": test.get("description", "")})
    times.sort()
    if times:
        row.compile_ms_p50 = round(statistics.median(times), 1)
        row.compile_ms_p95 = round(times[int(0.95 * (len(times) - 1))], 1)
        row.compile_ms_max = round(times[-1], 1)
    row.engines = dict(engines)
    row.why_refused = dict(why.most_common())
    return row


def suite(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, got {text}")
    return name, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=suite, action="append", required=True, help="NAME=FOLDER; may be repeated")
    parser.add_argument("--tokenizer", help="folder or .gguf file whose vocabulary is used; the default model's")
    parser.add_argument("--backend", choices=get_args(Backend), default="auto")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer or str(ensure_default_model()))
    stop = tokenizer.eos_token_id
    assert stop is not None
    vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size, [stop])
    _ = vocabulary.for_llguidance, vocabulary.for_xgrammar
    sys.setrecursionlimit(20_000)
    rows = [run(name, folder, vocabulary, tokenizer, args.backend) for name, folder in args.suite]
    head = [
        "suite",
        "schemas",
        "served",
        "refused",
        "valid rejected (closed, format)",
        "invalid accepted",
        "ms p50 / p95 / max",
    ]
    say(f"\n{tokenizer.vocab_size} tokens, backend {args.backend}\n")
    table = [
        [
            row.suite,
            row.schemas,
            row.served,
            row.refused,
            f"{row.valid_rejected} ({row.of_these_closed}, {row.of_these_format}) of {row.valid}",
            f"{row.invalid_accepted} of {row.invalid}",
            f"{row.compile_ms_p50} / {row.compile_ms_p95} / {row.compile_ms_max}",
        ]
        for row in rows
    ]
    print(markdown_table([head, *table]))
    if args.out is not None:
        result = {"machine": machine(), "vocabulary": tokenizer.vocab_size, "backend": args.backend}
        args.out.write_text(json.dumps(result | {"suites": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
