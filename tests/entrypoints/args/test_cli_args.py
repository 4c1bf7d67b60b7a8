"""Flags: spellings, those of other servers, and wrong values."""

from __future__ import annotations

import pytest

from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.args import cli_args, compatibility_args
from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.entrypoints.chat.served_models import ServedModels
from vllm.exceptions import StartupError


@pytest.fixture
def parse():
    parser = cli_args.make_arg_parser(FlexibleArgumentParser(prog="test"))
    return lambda *args: parser.parse_args(args)


def test_underscores_and_dashes_are_the_same(parse):
    for args in (["--max_model_len", "64"], ["--max-model-len", "64"], ["--max_model_len=64"], ["--max-model-len=64"]):
        assert parse(*args).max_model_len == 64


def test_switches_can_be_taken_back(parse):
    for name in ("enable_auto_tool_choice", "allow_credentials", "disable_fastapi_docs", "enable_force_include_usage"):
        assert getattr(parse(f"--{name}"), name) is True
        assert getattr(parse(f"--{name}", f"--no-{name}"), name) is False


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
        ["--use-v2-block-manager"],
        ["--num-scheduler-steps", "8"],
        ["--no-enable-chunked-prefill"],
        ["--compilation-config", '{"level": 3}'],
        ["--optimization-level", "3"],
        ["--cudagraph-capture-sizes", "1", "2", "4"],
        ["--moe-backend", "auto"],
        ["--no-enable-flashinfer-autotune"],
    ],
)
def test_flags_without_effect_are_accepted_with_a_warning(parse, args, monkeypatch):
    warnings = []
    monkeypatch.setattr(compatibility_args.logger, "warning", lambda text, *values: warnings.append(text % values))
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
        ["--quantization-config", "{ }"],
    ],
)
def test_values_that_ask_for_what_happens_anyway_are_accepted(parse, args):
    parse(*args)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--quantization", "aqlm"], "--quantization aqlm"),
        (["-q", "aqlm"], "--quantization aqlm is not supported by this server; choose from fp8, awq, gptq"),
        (["--enable-lora"], "--enable-lora"),
        (["--speculative-config", "{}"], "--speculative-config"),
        (["--speculative_config={}"], "--speculative-config"),
        (["--pipeline-parallel-size", "2"], "only 1 is"),
        (["--nnodes", "true"], "--nnodes true is not supported by this server; only 1 is"),
        (["--node-rank", "false"], "only 0 is"),
        (["--lora-modules", "a=b", "c=d"], "--lora-modules"),
        (["--max-num-queued-tokens", "9"], "--max-num-queued-tokens"),
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


def test_the_log_of_requests(parse, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(compatibility_args.logger, "warning", lambda text, *values: warnings.append(text % values))
    off = parse()
    assert (off.enable_log_requests, off.enable_log_outputs, off.enable_log_deltas) == (False, False, True)
    assert off.max_log_len is None
    assert parse("--enable-log-requests", "--max-log-len", "9").max_log_len == 9
    assert not parse("--enable-log-requests", "--no-enable-log-requests").enable_log_requests
    assert not warnings
    assert not parse("--enable-log-requests", "--disable-log-requests").enable_log_requests
    assert parse("--no-disable-log-requests").enable_log_requests
    assert warnings == [
        "--disable-log-requests is an older spelling of --no-enable-log-requests.",
        "--no-disable-log-requests is an older spelling of --enable-log-requests.",
    ]
    with pytest.raises(StartupError, match="--enable-log-outputs needs --enable-log-requests"):
        cli_args.check_args(parse("--enable-log-outputs"))


@pytest.mark.parametrize("args", [["--no-such-flag"], ["--max-model", "64"], ["--port"]])
def test_unknown_flags_and_abbreviations_are_one_line(parse, args, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*args)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# What deployments pass to vLLM, with a value where it takes one.
DEPLOYED = """
tensor-parallel-size=1 tool-call-parser=hermes reasoning-parser=qwen3 max-model-len=8k enable-auto-tool-choice
gpu-memory-utilization=0.9 trust-remote-code speculative-config={} max-num-seqs=8 model=m max-num-batched-tokens=4096
kv-cache-dtype=auto port=80 compilation-config={} host=::1 enable-expert-parallel attention-backend=TORCH block-size=16
served-model-name=m enable-prefix-caching no-enable-prefix-caching enforce-eager kv-transfer-config={}
data-parallel-size=1 async-scheduling max-cudagraph-capture-size=64 load-format=auto chat-template=t quantization=none
dtype=auto hf-overrides={} seed=1 default-chat-template-kwargs={} tokenizer-mode=auto enable-chunked-prefill
chat-template-content-format=auto tokenizer=t generation-config=vllm distributed-executor-backend=mp
pipeline-parallel-size=1 api-key=k enable-lora lora-modules=a=b enable-prompt-tokens-details kv-offloading-size=1
revision=main root-path=/a allowed-origins=* uvicorn-log-level=info disable-log-requests max-log-len=9
response-role=assistant swap-space=4 use-v2-block-manager num-scheduler-steps=8
""".split()  # noqa: SIM905 - as one reads it on a command line


@pytest.mark.parametrize("flag", DEPLOYED)
@pytest.mark.parametrize("spelling", ["dashes", "underscores"])
def test_flags_of_deployments_parse_or_are_refused_by_name(parse, flag, spelling, capsys):
    name, equals, value = flag.partition("=")
    argument = "--" + (name.replace("-", "_") if spelling == "underscores" else name)
    try:
        parse(argument, *([value] if equals else []))
    except SystemExit as end:
        assert end.code == 1
        message = capsys.readouterr().err
        assert f"--{name}" in message
        assert "not supported" in message


def test_keys_of_json_flags(parse):
    args = parse("--default-chat-template-kwargs.enable_thinking", "false", "--default_chat_template_kwargs.a.b_c=x")
    assert args.default_chat_template_kwargs == {"enable_thinking": False, "a": {"b_c": "x"}}


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_config_file_gives_flags_and_the_command_line_wins(parse, config_file):
    path = config_file(
        "model: from-file\nport: 8123\nserved_model_name: [a, b]\nenable-prefix-caching: false\n"
        "disable-uvicorn-access-log: true\nallow-credentials: false\napi-key: [x, y]\nseed:\n"
        "default-chat-template-kwargs: {enable_thinking: false}\nallowed-origins: ['http://a']\n"
    )
    args = parse("--config", path, "--api_key", "z", "--port=9")
    assert (args.model, args.port, args.api_key, args.served_model_name) == ("from-file", 9, ["z"], ["a", "b"])
    assert (args.enable_prefix_caching, args.disable_uvicorn_access_log, args.allow_credentials) == (False, True, False)
    assert (args.default_chat_template_kwargs, args.allowed_origins) == ({"enable_thinking": False}, ["http://a"])
    assert args.seed is None
    assert parse(f"--config={path}", "--enable-prefix-caching").enable_prefix_caching is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no-such: 1", "--no-such"),
        ("enforce-eager: 3", "true or false"),
        ("- a", "`name: value`"),
        ("a: [", "not YAML"),
        ("port: eighty", "0 to 65535"),
        ("enable-lora: true", "--enable-lora"),
    ],
)
def test_wrong_config_files_are_one_line(parse, config_file, text, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--config", config_file(text))
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert words in message


def test_a_config_file_must_exist(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--config", "/no/such.yaml")
    assert "/no/such.yaml cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("topic", "shown", "hidden"),
    [
        ("listgroup", "KV cache\n", "--port"),
        ("KV-cache", "--block-size", "--port"),
        ("max_num", "--max-num-seqs", "--port"),
        ("all", "--port", "no such thing"),
    ],
)
def test_help_on_a_topic(parse, topic, shown, hidden, capsys):
    with pytest.raises(SystemExit) as end:
        parse(f"--help={topic}")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert shown in text
    assert hidden not in text


def test_help_on_nothing_that_exists(parse, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help=nonsense")
    assert end.value.code == 2
    assert "listgroup" in capsys.readouterr().err


def test_help_has_groups(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for title in ("model:", "KV cache:", "scheduler:", "system prompts:", "HTTP server:", "flags of other servers:"):
        assert f"\n{title}\n" in text


def test_sampling_defaults_come_from_a_folder_and_by_flag(tiny_model_dir, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.3, "top_k": 7}')

    def defaults(**args):
        return EngineArgs(model=str(tiny_model_dir), **args).create_engine_config().model.generation_defaults

    more = {"temperature": 0.5, "max_new_tokens": 9}
    assert defaults(generation_config=str(tmp_path)) == {"temperature": 0.3, "top_k": 7}
    assert defaults(generation_config=str(tmp_path), override_generation_config=more) == {
        "temperature": 0.5,
        "top_k": 7,
        "max_tokens": 9,
    }
    assert defaults(generation_config="vllm") == {}
    with pytest.raises(StartupError, match=r"--override-generation-config holds max_tokens"):
        defaults(override_generation_config={"max_tokens": 1})
    with pytest.raises(StartupError, match=r"--generation-config must be .* /no/such"):
        defaults(generation_config="/no/such")


def test_names_of_other_attention_kernels_are_taken_but_not_made_up_ones(tiny_model_dir):
    def backend(name: str | None) -> str:
        args = EngineArgs(model=str(tiny_model_dir), attention_backend=name, device="cpu")
        return args.create_engine_config().attention_backend

    assert backend("FLASH_ATTN") == backend("flashinfer") == backend(None)
    assert backend("torch").upper() == "TORCH"
    with pytest.raises(StartupError, match=r"--attention-backend FAST is not known; choose from TORCH"):
        backend("FAST")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"chat_template": "{%bad"}, r"--chat-template: Encountered unknown tag 'bad' \(line 1 of the template\)"),
        ({"chat_template": "a\n{{ b"}, r"--chat-template: .* \(line 2 of the template\)"),
        ({"chat_template": "/no/such"}, "neither a template nor a readable file"),
        ({"served_model_name": ["m", ""]}, "--served-model-name must not be empty"),
        ({"served_model_name": ""}, "--served-model-name must not be empty"),
    ],
)
def test_what_no_request_could_use_ends_the_start(tiny_model_dir, args, words):
    with pytest.raises(StartupError, match=words):
        EngineArgs(model=str(tiny_model_dir), **args).create_engine_config()


def test_a_template_may_refuse_some_chats(tiny_model_dir):
    source = "{{ raise_exception('no') if messages|length < 2 else 'x' }}"
    assert EngineArgs(model=str(tiny_model_dir), chat_template=source).create_engine_config().model.chat_template


def test_the_kv_cache_has_the_dtype_of_the_model(tiny_model_dir):
    def make(dtype: str) -> None:
        EngineArgs(model=str(tiny_model_dir), dtype="bfloat16", kv_cache_dtype=dtype).create_engine_config()

    make("auto")
    make("bfloat16")
    for dtype in ("fp8", "float16"):
        with pytest.raises(StartupError, match=rf"--kv-cache-dtype {dtype} is not built.*bfloat16"):
            make(dtype)


def test_the_fingerprint_is_what_its_mode_says(tiny_model_dir):
    def fingerprint(mode, value=None, **overrides):
        config = EngineArgs(model=str(tiny_model_dir), hf_overrides=overrides).create_engine_config()
        return ServedModels(config, mode, value).fingerprint

    digest = fingerprint("hash")
    assert fingerprint("hash") == digest
    assert fingerprint("full").endswith(digest)
    assert fingerprint("hash", rms_norm_eps=0.5) != digest
    assert fingerprint("none") is None
    for value in ("mine", "hash", "full", "none"):
        assert fingerprint("custom", value) == value


def test_the_engine_of_schemas_is_chosen_as_in_vllm(parse, tiny_model_dir):
    for args, backend in (
        ([], "auto"),
        (["--structured-outputs-config", '{"backend": "xgrammar"}'], "xgrammar"),
        (["--structured-outputs-config.backend", "guidance"], "guidance"),
    ):
        engine_args = EngineArgs.from_cli_args(parse("--model", str(tiny_model_dir), *args))
        assert engine_args.create_engine_config().model.structured_outputs_backend == backend
    for config, words in (
        ({"backend": "outlines"}, "must be auto, guidance or xgrammar, got 'outlines'"),
        ({"disable_fallback": True}, "holds disable_fallback; it may hold backend only"),
    ):
        with pytest.raises(StartupError, match=words):
            EngineArgs(model=str(tiny_model_dir), structured_outputs_config=config).create_engine_config()


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        (["-ep"], "--enable-expert-parallel"),
        (["-cc.mode", "3"], "--compilation-config"),
        (["-O3"], "--optimization-level"),
        (["-n", "1", "-r", "0", "-tp=1", "-dp", "1", "-pp", "1", "-dcp", "1"], None),
        (["--language-model-only"], None),
    ],
)
def test_short_names_stand_for_long_ones(parse, monkeypatch, given, warned):
    said = []
    monkeypatch.setattr(compatibility_args.logger, "warning", lambda text, option: said.append(option))
    assert parse(*given).tensor_parallel_size == 1
    assert [option.partition("=")[0] for option in said] == ([warned] if warned else [])
