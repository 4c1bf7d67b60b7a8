"""Commands of `vllm` beside `serve`, run as a user runs them, against a real server."""

from __future__ import annotations

import io
import json
import sys

import pytest

from server_process import free_port
from vllm.entrypoints.cli.api_client import ApiClient
from vllm.entrypoints.cli.main import main


@pytest.fixture
def vllm(capsys):
    """Runs a command; returns its exit code, what it printed and what it said on stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(argv)
        return (end.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def url(server):
    return f"{server.url}/v1"


def nowhere() -> str:
    return f"http://127.0.0.1:{free_port()}"


# chat and complete -----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The bodies that the client sends from now on. Each asks for few tokens: at temperature 1 the default model may
    talk to the end of its context."""
    bodies = []
    stream = ApiClient.stream

    def watched(self, path, body):
        bodies.append(body)
        return stream(self, path, body | {"max_tokens": 24})

    monkeypatch.setattr(ApiClient, "stream", watched)
    return bodies


@pytest.mark.usefixtures("asked")
def test_a_quick_message_is_answered(vllm, url):
    code, out, _ = vllm("chat", "--url", url, "-q", "Say hello.", "--system-prompt", "You are terse.")
    assert code == 0
    assert len(out.strip()) > 3


def test_a_chat_remembers_its_turns(vllm, server, url, asked, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say one.\n\nSay two.\n"))
    code, out, _ = vllm("chat", "--url", url, "--model-name", server.model, "--system_prompt", "Answer briefly.")
    assert code == 0
    assert out.startswith(f"Using model: {server.model}\n")
    assert out.count("> ") == 4  # two messages, an empty line, the end
    first, second = (body["messages"] for body in asked)
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user"]
    assert second[:2] == first
    assert second[2]["content"]
    assert second[2]["content"] in out


def test_a_text_is_completed_to_so_many_tokens(vllm, url):
    outs = [vllm("complete", "--url", url, "--max-tokens", n, "-q", "One, two, three,")[1] for n in ("1", "12")]
    assert 0 < len(outs[0].strip()) < len(outs[1].strip())


def test_texts_are_completed_until_the_input_ends(vllm, url, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a\nTwice upon a\n"))
    code, out, _ = vllm("complete", "--url", url, "--max-tokens", "2")
    assert code == 0
    assert out.count("> ") == 3


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_what_a_server_refuses_is_one_line(vllm, url, command):
    code, _, err = vllm(command, "--url", url, "--model-name", "no-such", "-q", "Hello")
    assert code == 1
    assert err.startswith("error: The server answers 404: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_a_server_that_is_not_there_is_one_line(vllm, command):
    code, _, err = vllm(command, "--url", f"{nowhere()}/v1", "-q", "Hello")
    assert code == 1
    assert "--url" in err
    assert err.count("\n") == 1


# bench -----------------------------------------------------------------------------------------------------------

TOTALS = {
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
    "rtfx",
    "latencies",
    "queue_times",
}
SETTINGS = {
    "date",
    "endpoint_type",
    "backend",
    "label",
    "model_id",
    "tokenizer_id",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
}
DETAILS = {"input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors"}


def statistics(*metrics: str, percentiles: tuple[str, ...] = ("99",)) -> set[str]:
    kinds = ["mean", "median", "std", *(f"p{p}" for p in percentiles)]
    return {f"{kind}_{metric}_ms" for kind in kinds for metric in metrics}


def bench_serve(vllm, server, folder, *more: str) -> dict:
    code, out, err = vllm(
        *("bench", "serve", "--port", str(server.port), "--tokenizer", server.model_path, "--disable-tqdm"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "r.json", *more),
    )
    assert code == 0, err
    assert "Serving Benchmark Result" in out
    return json.loads((folder / "r.json").read_text())


@pytest.fixture
def bench(vllm, server, default_model_path, tmp_path):
    server.model_path = default_model_path
    return lambda *more: bench_serve(vllm, server, tmp_path, *more)


def test_results_of_a_served_run_have_the_names_of_vllm(bench, server):
    result = bench("--num-prompts", "4", "--input-len", "12", "--output-len", "5", "--ignore-eos")
    assert result.keys() == TOTALS | SETTINGS | statistics("ttft", "tpot", "itl")
    assert (result["completed"], result["failed"]) == (4, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (48, 20)
    assert (result["request_rate"], result["max_concurrency"], result["backend"]) == ("inf", None, "openai")
    assert result["model_id"] == server.model
    assert result["output_throughput"] == pytest.approx(20 / result["duration"])


def test_load_and_statistics_are_what_was_asked_for(bench):
    result = bench(
        *("--backend", "openai-chat", "--dataset-name", "sharegpt", "--num-prompts", "5", "--output-len", "6"),
        *("--request-rate", "50", "--max-concurrency", "2", "--ignore-eos", "--temperature", "0", "--save-detailed"),
        *("--percentile-metrics", "ttft,e2el", "--metric-percentiles", "50,99.9", "--goodput", "e2el:1e9"),
        *("--metadata", "machine=mine", "--num-warmups", "1"),
    )
    times = statistics("ttft", "e2el", percentiles=("50", "99.9"))
    assert result.keys() == TOTALS | SETTINGS | DETAILS | times | {"machine"}
    assert result["output_lens"] == [6] * 5
    assert len(set(result["input_lens"])) > 1
    assert result["max_concurrent_requests"] <= 2
    assert len(result["latencies"]) == 5
    # Only as many are sent at once as may be open; the last of the others waited for an answer.
    assert max(result["queue_times"]) >= min(result["latencies"])
    assert result["request_goodput"] == result["request_throughput"]
    assert all(ttft > 0 for ttft in result["ttfts"])
    assert result["p50_e2el_ms"] >= result["p50_ttft_ms"] > 0


def test_requests_of_a_file(bench, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "One two"}\n\n{"prompt": "Three"}\n')
    result = bench("--dataset-name", "custom", "--dataset-path", str(path), "--num-prompts", "3", "--output-len", "2")
    assert result["completed"] == 3


def test_failed_requests_are_counted_and_told(bench, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps({"prompt": "Hi"}) + "\n" + json.dumps({"prompt": "word " * 3000}))
    args = ("--dataset-name", "custom", "--dataset-path", str(path), "--num-prompts", "2", "--custom-output-len", "2")
    result = bench(*args, "--save-detailed")
    assert (result["completed"], result["failed"]) == (1, 1)
    assert result["errors"][0] == ""
    assert result["errors"][1].startswith("400: ")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--request-rate", "0"], "--request-rate"),
        (["--max-concurrency", "0"], "--max-concurrency"),
        (["--percentile-metrics", "ttfb"], "ttfb"),
        (["--metric-percentiles", "101"], "0 to 100"),
        (["--goodput", "ttft:fast"], "--goodput"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--dataset-name", "custom"], "--dataset-path"),
        (["--dataset-name", "sharegpt", "--dataset-path", "/no/such"], "/no/such"),
        (["--header", "x"], "NAME=VALUE"),
        (["--served-model-name", "no-such", "--num-prompts", "1"], "no-such"),
    ],
)
def test_what_cannot_be_measured_is_one_line(vllm, server, default_model_path, args, words):
    code, _, err = vllm("bench", "serve", "--port", str(server.port), "--tokenizer", default_model_path, *args)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_no_server_to_measure_is_one_line(vllm):
    code, _, err = vllm("bench", "serve", "--base-url", nowhere(), "--ready-check-timeout-sec", "0")
    assert code == 1
    assert "There is no server" in err


@pytest.fixture
def offline(run_vllm, tiny_model_dir):
    """In a process of its own: the engine takes memory that the tests' process keeps."""

    def run(kind: str, path: object, *args: str) -> str:
        size = ("--max-model-len", "256", "--num-gpu-blocks-override", "128")
        done = run_vllm("bench", kind, "--model", tiny_model_dir, *size, "--output-json", path, *args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_throughput_of_the_engine(offline, tmp_path):
    path = tmp_path / "throughput.json"
    args = ("--input-len", "20", "--output-len", "4", "--num-prompts", "5", "--swap_space", "4")
    out = offline("throughput", path, *args)
    result = json.loads(path.read_text())
    names = {"elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"}
    assert result.keys() == names
    assert (result["num_requests"], result["total_num_tokens"]) == (5, 120)
    assert result["tokens_per_second"] == pytest.approx(120 / result["elapsed_time"])
    assert out.startswith("Throughput: ")


def test_latency_of_the_engine(offline, tmp_path):
    path = tmp_path / "latency.json"
    args = ("--input-len", "9", "--output-len", "3", "--batch-size", "2", "--num-iters", "3", "--num-iters-warmup", "1")
    out = offline("latency", path, *args)
    result = json.loads(path.read_text())
    assert result.keys() == {"avg_latency", "latencies", "percentiles"}
    assert len(result["latencies"]) == 3
    assert result["percentiles"].keys() == {"10", "25", "50", "75", "90", "99"}
    assert out.startswith("Avg latency: ")


# collect-env and the rest ----------------------------------------------------------------------------------------


def test_the_environment_is_told_without_secrets(vllm, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "hush")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    code, out, _ = vllm("collect-env")
    assert code == 0
    for words in ("vLLM version", "torch  ", "Memory", "VLLM_LOGGING_LEVEL", "DEBUG"):
        assert words in out
    assert "hush" not in out


def test_the_commands_are_listed(vllm):
    code, out, _ = vllm("--help")
    assert code == 0
    for command in ("serve", "chat", "complete", "bench", "collect-env"):
        assert f"    {command} " in out
    assert vllm("bench")[0] == 2
    assert vllm("no-such-command")[0] == 2
