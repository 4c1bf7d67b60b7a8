from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_files import write_gguf
from hypothesis import given
from hypothesis import strategies as st

from vllm.exceptions import StartupError, VLLMValidationError
from vllm.transformers_utils.tokenizer import Tokenizer, load_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "data" / "smollm2_llamacpp_tokens.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: ascii(case["text"])[:40])
def test_tokens_are_llama_cpps(tokenizer: Tokenizer, case: dict) -> None:
    assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: ascii(case["text"])[:40])
def test_bytes_of_tokens_are_the_text(tokenizer: Tokenizer, case: dict) -> None:
    assert b"".join(tokenizer.token_bytes(i) for i in case["ids"]).decode() == case["text"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["text"]


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_other_threads_run_while_a_long_text_is_read(tokenizer: Tokenizer, what: str) -> None:
    text = "the quick brown fox 12 jumps over, and so on. " * 8000
    work: Any = (tokenizer.encode, text) if what == "encode" else (tokenizer.decode, tokenizer.encode(text))
    turns = 0
    seen: list[int] = []

    def read() -> None:
        begin = turns
        work[0](work[1])
        seen.append(turns - begin)

    thread = threading.Thread(target=read)
    thread.start()
    while not seen:
        turns += 1
    thread.join()
    assert seen[0] > 1000


def test_what_the_default_model_declares(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.all_special_ids == list(range(17))
    assert tokenizer.hf.model_max_length == 8192
    assert "<|im_start|>" in tokenizer.hf.chat_template
    assert tokenizer.encode("Hi") == tokenizer.encode("Hi", add_special_tokens=False)


def test_survives_being_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.hf.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert all(again.encode(case["text"], add_special_tokens=False) == case["ids"] for case in GOLDEN)
    assert again.hf.chat_template == tokenizer.hf.chat_template
    assert (again.eos_token_id, again.all_special_ids) == (tokenizer.eos_token_id, tokenizer.all_special_ids)


def test_control_tokens_are_skipped_only_when_asked(small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode("<|im_start|>hello<tag><|im_end|>")
    assert len(ids) == 4
    assert small_tokenizer.decode(ids) == "hello<tag>"
    assert small_tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hello<tag><|im_end|>"


def test_text_of_one_token(small_tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer) -> None:
    (space,) = small_tokenizer.encode(" ")
    assert small_tokenizer.token_text(space) == " "
    half = small_tokenizer.encode("\u00e9")[0]
    assert small_tokenizer.token_bytes(half) == b"\xc3"
    assert small_tokenizer.token_text(half) == "\ufffd"
    assert small_tokenizer.token_text(10**6) == ""
    word = sentencepiece_tokenizer.backend.token_to_id("\u2581He")
    assert sentencepiece_tokenizer.token_text(word) == " He"
    byte = sentencepiece_tokenizer.backend.token_to_id("<0xE4>")
    assert sentencepiece_tokenizer.token_bytes(byte) == b"\xe4"


@given(text=st.text())
def test_no_token_stands_for_more_characters_than_declared(small_tokenizer: Tokenizer, text: str) -> None:
    assert len(text) <= small_tokenizer.max_chars_per_token * len(small_tokenizer.encode(text))


def test_bos_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    with_bos = load_tokenizer(str(write_gguf(tmp_path / "a.gguf", {}, extra={"tokenizer.ggml.add_bos_token": True})))
    assert with_bos.encode("hello") == [1, *with_bos.encode("hello", add_special_tokens=False)]
    llama3 = load_tokenizer(str(write_gguf(tmp_path / "b.gguf", {}, pre="llama-bpe")))
    assert llama3.encode("hello")[0] == 1


def test_digits_are_cut_as_the_file_says(tmp_path: Path) -> None:
    counts = {}
    for pre in ("smollm", "qwen2", "gpt-2", "llama-bpe"):
        counts[pre] = len(load_tokenizer(str(write_gguf(tmp_path / f"{pre}.gguf", {}, pre=pre))).encode("1212", False))
    # "12" is a token; llama-bpe takes three digits together: "121" + "2".
    assert counts == {"smollm": 4, "qwen2": 4, "gpt-2": 2, "llama-bpe": 3}


def test_a_lone_surrogate_is_refused(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(VLLMValidationError, match="surrogate"):
        small_tokenizer.encode("a\ud800b")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"pre": "klingon"}, "'klingon'.*--tokenizer"), ({"tokenizer_model": "bert"}, "'bert'.*--tokenizer")],
)
def test_unknown_vocabularies_say_what_to_do(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        load_tokenizer(str(write_gguf(tmp_path / "m.gguf", {}, **change)))


def test_a_directory_without_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(StartupError, match=str(tmp_path)) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def write_sentencepiece(path: Path, **extra: Any) -> Path:
    """A vocabulary of SentencePiece's kind: words with scores, bytes, control tokens and one that stands for itself."""
    words = ["\u2581", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "\u2581w", "or", "hell", "\u2581wor", "ld"]
    words += ["hello", "\u2581world", "\u2581h", "\u2581hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, "  "]
    types = [2, 3, 3] + [6] * 256 + [1] * len(words) + [4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-1000.0]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in extra.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def pieces(tokenizer: Tokenizer, text: str) -> list[str | None]:
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


def test_sentencepiece_vocabularies_join_by_score(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_sentencepiece(tmp_path / "m.gguf")))
    assert pieces(tokenizer, "hello world") == ["<s>", "\u2581hello", "\u2581world"]
    assert pieces(tokenizer, "é") == ["<s>", "\u2581", "<0xC3>", "<0xA9>"]
    # A token that stands for itself is taken before any are joined; the text after it begins anew.
    assert pieces(tokenizer, "he  he") == ["<s>", "\u2581", "he", "  ", "\u2581", "he"]
    for text in ("hello world", "é🦊 x", " hello", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    plain = load_tokenizer(str(write_sentencepiece(tmp_path / "p.gguf", add_space_prefix=False, add_bos_token=False)))
    assert pieces(plain, "hello world") == ["hello", "\u2581world"]
    assert plain.decode(plain.encode(" hello")) == " hello"


def test_a_file_without_a_way_of_cutting_says_loudly_that_it_is_guessed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_tokenizer(str(write_gguf(tmp_path / "m.gguf", {}, pre=None))).encode("hello")
    assert any("GUESS" in record.message and "--tokenizer" in record.message for record in caplog.records)
    caplog.clear()
    load_tokenizer(str(write_gguf(tmp_path / "n.gguf", {}, pre="smollm")))
    assert not caplog.records


def test_a_template_for_tools_is_used_where_tools_are_given(tmp_path: Path) -> None:
    extra = {"tokenizer.chat_template.tool_use": "{{ tools[0].function.name }}: {{ messages[0].content }}"}
    hf = load_tokenizer(str(write_gguf(tmp_path / "m.gguf", {}, extra=extra))).hf
    chat, tool = [{"role": "user", "content": "hi"}], {"type": "function", "function": {"name": "f"}}
    assert hf.apply_chat_template(chat, tokenize=False).startswith("<|im_start|>user")
    assert hf.apply_chat_template(chat, tools=[tool], tokenize=False) == "f: hi"
