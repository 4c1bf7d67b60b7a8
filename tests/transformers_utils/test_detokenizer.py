from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.transformers_utils.detokenizer import ByteDetokenizer, WindowDetokenizer, incremental_detokenizer
from vllm.transformers_utils.tokenizer import Tokenizer

TEXTS = [
    "Hello world, this is plain.",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01 \u6771\u4eac 20\u5ea6",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 flags \U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd",
    "e\u0301 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947",
    "  leading\n\n\tand trailing  ",
    "a real \ufffd replacement \ufffd\ufffd",
]


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> list[str]:
    """Pieces of the text, which is the same from each detokenizer that can do it."""
    assert isinstance(incremental_detokenizer(tokenizer, prompt, skip), ByteDetokenizer) == tokenizer.joins_bytes
    found = []
    for kind in (incremental_detokenizer, WindowDetokenizer):
        detokenizer = kind(tokenizer, prompt, skip)
        found.append([*(detokenizer.append(i) for i in output), detokenizer.flush()])
    assert "".join(found[0]) == "".join(found[1])
    return found[0]


def rest(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> str:
    """What the output adds to the prompt's text."""
    return tokenizer.decode(prompt + output, skip)[len(tokenizer.decode(prompt, skip)) :]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, tokenizer.encode("Say it:\n"), ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_over_several_tokens_comes_when_it_is_whole(small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode("\U0001f600!")
    assert len(ids) == 5
    assert stream(small_tokenizer, [], ids) == ["", "", "", "\U0001f600", "!", ""]


def test_an_unfinished_character_comes_at_the_end(small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode("ok\U0001f600")[:-1]
    assert stream(small_tokenizer, [], ids) == ["o", "k", "", "", "", "\ufffd"]


def test_flush_is_empty_when_nothing_is_pending_and_the_second_time(small_tokenizer: Tokenizer) -> None:
    detokenizer = incremental_detokenizer(small_tokenizer, [])
    detokenizer.append(small_tokenizer.encode("\u00e9")[0])
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_plain_text_is_never_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The quick brown fox jumps over 12 lazy dogs.\n\nAnd so on; it's fine.")
    assert stream(tokenizer, [], ids)[:-1] == [tokenizer.token_text(i) for i in ids]


@pytest.mark.parametrize("skip", [True, False])
def test_control_tokens_appear_only_if_not_skipped(small_tokenizer: Tokenizer, skip: bool) -> None:
    ids = small_tokenizer.encode("<|im_start|>hello <|im_end|><|im_end|> 12<tag>")
    text = "hello  12<tag>" if skip else "<|im_start|>hello <|im_end|><|im_end|> 12<tag>"
    assert "".join(stream(small_tokenizer, [0, 1], ids, skip)) == text


def test_leading_space_is_kept_after_a_prompt(sentencepiece_tokenizer: Tokenizer) -> None:
    prompt = sentencepiece_tokenizer.encode("He a")
    output = sentencepiece_tokenizer.encode("He b")
    assert "".join(stream(sentencepiece_tokenizer, prompt, output)) == " He b"
    assert "".join(stream(sentencepiece_tokenizer, [], output)) == "He b"


def test_control_tokens_do_not_swallow_spaces(sentencepiece_tokenizer: Tokenizer) -> None:
    bos, word = 1, sentencepiece_tokenizer.backend.token_to_id("\u2581He")
    prompt = [word] + [bos] * 40
    assert "".join(stream(sentencepiece_tokenizer, prompt, [bos, word, bos, bos, word])) == " He He"


def test_characters_in_byte_tokens(sentencepiece_tokenizer: Tokenizer) -> None:
    output = sentencepiece_tokenizer.encode("He \U0001f600\u4f60 a\u00e9")
    pieces = stream(sentencepiece_tokenizer, [], output)
    assert "".join(pieces) == "He \U0001f600\u4f60 a\u00e9"
    assert not any("\ufffd" in piece for piece in pieces)


def test_byte_tokens_that_are_no_text_do_not_pile_up(sentencepiece_tokenizer: Tokenizer) -> None:
    lone = sentencepiece_tokenizer.backend.token_to_id("<0xFF>")
    detokenizer = incremental_detokenizer(sentencepiece_tokenizer, [])
    text = ""
    for _ in range(500):
        text += detokenizer.append(lone)
        assert len(detokenizer._ids) <= 65
    assert text + detokenizer.flush() == "\ufffd" * 500


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 299), max_size=20),
    output=st.lists(st.integers(0, 299), max_size=60),
    skip=st.booleans(),
)
def test_any_tokens_give_the_text_of_the_whole(
    small_tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool
) -> None:
    # A prompt that ends inside a character shares it with the output; then the two texts cannot be told apart.
    prompt = [*prompt, *small_tokenizer.encode("hello")]
    assert "".join(stream(small_tokenizer, prompt, output, skip)) == rest(small_tokenizer, prompt, output, skip)


def test_long_output_that_is_no_text_stays_exact_and_its_window_small(small_tokenizer: Tokenizer) -> None:
    lone = [small_tokenizer.encode("\U0001f600")[i] for i in range(4)]
    rng = random.Random(3)
    output = [rng.choice(lone) for _ in range(2000)] + [lone[0]] * 500
    detokenizer = WindowDetokenizer(small_tokenizer, [])
    text = ""
    for token_id in output:
        text += detokenizer.append(token_id)
        assert len(detokenizer._ids) <= 65
    assert text + detokenizer.flush() == small_tokenizer.decode(output)


def test_all_tokens_of_the_default_model_in_random_order(tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    prompt = tokenizer.encode("<|im_start|>assistant\n")
    for _ in range(20):
        output = [rng.randrange(tokenizer.vocab_size) for _ in range(300)]
        for skip in (True, False):
            assert "".join(stream(tokenizer, prompt, output, skip)) == rest(tokenizer, prompt, output, skip)


@pytest.mark.parametrize("cut", range(12))
def test_a_fork_goes_on_by_itself(tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer, cut: int) -> None:
    for each in (tokenizer, sentencepiece_tokenizer):
        ids, other = each.encode("naïve 🤗🤗 日本"), each.encode("é and more")
        first = incremental_detokenizer(each, [])
        head = "".join(first.append(token_id) for token_id in ids[:cut])
        second = first.fork()
        pieces = [second.append(token_id) for token_id in other], [first.append(token_id) for token_id in ids[cut:]]
        ends = second.flush(), first.flush()
        fresh = [incremental_detokenizer(each, []) for _ in range(2)]
        for tokens, detokenizer, tail, end in zip((ids[:cut] + other, ids), fresh, pieces, ends, strict=True):
            whole = "".join(detokenizer.append(token_id) for token_id in tokens) + detokenizer.flush()
            assert head + "".join(tail) + end == whole
