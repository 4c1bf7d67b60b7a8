"""Flags: spellings, those of other servers, and wrong values."""

from __future__ import annotations

import pytest

from vllm.entrypoints.cli.parser import FlexibleArgumentParser
from vllm.entrypoints.openai import cli_args


@pytest.fixture
def parse():
    parser = cli_args.make_arg_parser(FlexibleArgumentParser(prog="test"))
    return lambda *args: parser.parse_args(args)


def test_underscores_and_dashes_are_the_same(parse):
    for args in (["--max_model_len", "64"], ["--max-model-len", "64"], ["--max_model_len=64"], ["--max-model-len=64"]):
        assert parse(*args).max_model_len == 64


def test_values_keep_their_underscores(parse):
    assert parse("--served_model_name=my_model").served_model_name == ["my_model"]
    assert parse("--model", "my_model").model == "my_model"


def test_api_keys_add_up(parse):
    assert parse("--api-key", "a", "--api-key", "b", "c").api_key == ["a", "b", "c"]
    assert parse().api_key is None


def test_lists_of_origins(parse):
    assert parse("--allowed-origins", '["http://a", "http://b"]').allowed_origins == ["http://a", "http://b"]
    assert parse("--allowed-origins", "http://a,http://b").allowed_origins == ["http://a", "http://b"]


@pytest.mark.parametrize(
    "args",
    [
        ["--swap-space", "4"],
        ["--disable-log-requests"],
        ["--use-v2-block-manager"],
        ["--num-scheduler-steps", "8"],
        ["--no-enable-chunked-prefill"],
        ["--compilation-config", '{"level": 3}'],
    ],
)
def test_flags_without_effect_are_accepted_with_a_warning(parse, args, monkeypatch):
    warnings = []
    monkeypatch.setattr(cli_args.logger, "warning", lambda text, *values: warnings.append(text % values))
    parse(*args)
    assert warnings == [f"{args[0]} has no effect in this server."]


@pytest.mark.parametrize(
    "args",
    [
        ["--pipeline-parallel-size", "1"],
        ["-pp", "1"],
        ["--data_parallel_size=1"],
        ["--distributed-executor-backend", "mp"],
        ["--tokenizer-mode", "auto"],
        ["--chat-template-content-format", "string"],
    ],
)
def test_values_that_ask_for_what_happens_anyway_are_accepted(parse, args):
    parse(*args)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--quantization", "awq"], "--quantization awq"),
        (["-q", "awq"], "--quantization awq"),
        (["--enable-lora"], "--enable-lora"),
        (["--speculative-config", "{}"], "--speculative-config"),
        (["--speculative_config={}"], "--speculative-config"),
        (["--tool-call-parser", "hermes"], "--tool-call-parser"),
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice"),
        (["--pipeline-parallel-size", "2"], "only 1 is"),
        (["--lora-modules", "a=b", "c=d"], "--lora-modules"),
        (["--port", "eighty"], "0 to 65535"),
        (["--port", "70000"], "0 to 65535"),
        (["--api-key", ""], "empty"),
        (["--root-path", "api"], "slash"),
        (["--ssl-certfile", "/no/such/file"], "/no/such/file"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout"),
        (["--default-chat-template-kwargs", "[1]"], "JSON object"),
        (["--allowed-origins", "[1]"], "JSON list"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(parse, args, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*args)
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert words in message


@pytest.mark.parametrize("args", [["--no-such-flag"], ["--max-model", "64"], ["--port"]])
def test_unknown_flags_and_abbreviations_are_one_line(parse, args, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*args)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_has_groups(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for title in ("model:", "KV cache:", "scheduler:", "system prompts:", "HTTP server:", "flags of other servers:"):
        assert f"\n{title}\n" in text
