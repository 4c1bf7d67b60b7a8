from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_template import BARE, FOLDED, MARKED, SYSTEM, TOOLS, user
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from vllm.transformers_utils.chat_template import ChatRenderer
from vllm.transformers_utils.text_heads import TextHeads
from vllm.transformers_utils.tokenizer import Tokenizer

LETTERS = "\u2581abcdefgh<|>_/xy\n 12"
MERGES = [
    ("b", "c"),
    ("a", "b"),
    ("ab", "c"),
    ("\u2581", "a"),
    (" ", "a"),
    ("\n", "\n"),
    ("d", "d"),
    ("|", ">"),
    ("x", "y"),
]
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [*LETTERS, *("".join(merge) for merge in MERGES)]


def plain() -> Backend:
    vocab = {word: i for i, word in enumerate(WORDS)}
    backend = Backend(models.BPE(vocab, MERGES, ignore_merges=False))
    backend.add_tokens([AddedToken("<|x|>", special=True, normalized=False), AddedToken("\n\n", normalized=False)])
    return backend


def byte_level() -> Backend:
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)} | {"bc": 300, "ab": 301}, MERGES[:2]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\p{L}+|\s+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    backend.add_tokens([AddedToken("<|x|>", special=True, normalized=False)])
    return backend


def with_words(*steps: Any) -> Callable[[], Backend]:
    def build() -> Backend:
        backend = byte_level()
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
        return backend

    return build


def split_at(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def unigram() -> Backend:
    backend = Backend(models.Unigram([("<unk>", 0.0), *((word, -1.0 - len(word)) for word in WORDS)], 0))
    backend.add_tokens([AddedToken("<|x|>", special=True, normalized=False)])
    return backend


def changed(change: Callable[[Backend], object]) -> Callable[[], Backend]:
    def build() -> Backend:
        backend = plain()
        change(backend)
        return backend

    return build


def with_tokens(*tokens: AddedToken) -> Callable[[], Backend]:
    return changed(lambda backend: backend.add_tokens(list(tokens)))


def with_step(**steps: Any) -> Callable[[], Backend]:
    return changed(lambda backend: [setattr(backend, name, step) for name, step in steps.items()])


def rstrip_only() -> Backend:
    backend = Backend(models.BPE({word: i for i, word in enumerate(WORDS)}, MERGES))
    backend.add_tokens([AddedToken("<|x|>", special=True, normalized=False, rstrip=True)])
    return backend


def normalized_only() -> Backend:
    backend = Backend(models.BPE({word: i for i, word in enumerate(WORDS)}, MERGES))
    # What is taken after the normalizer may be made by it, of letters before and behind the cut.
    backend.normalizer = normalizers.Replace("yy", "x|>")
    backend.add_tokens([AddedToken("<|x|>", special=True, normalized=True)])
    return backend


KINDS: dict[str, tuple[Callable[[], Backend], bool]] = {
    "plain": (plain, True),
    "byte level with prefix space": (byte_level, True),
    "metaspace before every stretch": (
        with_step(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always")),
        True,
    ),
    "prepending normalizer": (
        with_step(normalizer=normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])),
        True,
    ),
    "stripping normalizer": (with_step(normalizer=normalizers.Strip()), True),
    "token that takes the space before it": (with_tokens(AddedToken("<y>", normalized=False, lstrip=True)), True),
    "normalized token beside": (with_tokens(AddedToken("ab", normalized=True)), True),
    "metaspace before the first stretch": (
        with_step(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
        False,
    ),
    "whole words": (with_tokens(AddedToken("ab", normalized=False, single_word=True)), False),
    "longer token": (with_tokens(AddedToken("<|x|>a", normalized=False)), False),
    "token across": (with_tokens(AddedToken("|>b", normalized=False)), False),
    "token that takes the space behind it": (rstrip_only, False),
    "normalized token": (normalized_only, False),
    "words of GPT-2": (with_words(pre_tokenizers.ByteLevel(add_prefix_space=False)), True),
    "words of Llama 3": (with_words(split_at(LLAMA_WORDS), pre_tokenizers.ByteLevel(False, use_regex=False)), True),
    "words of Tekken": (with_words(split_at(TEKKEN_WORDS), pre_tokenizers.ByteLevel(False, use_regex=False)), True),
    "digits, then words": (
        with_words(split_at(r"\p{N}{1,3}"), split_at(LLAMA_WORDS), pre_tokenizers.ByteLevel(False, use_regex=False)),
        True,
    ),
    "unigram": (unigram, True),
}
WITH_GAPS = {
    "plain",
    "metaspace before every stretch",
    "prepending normalizer",
    "token that takes the space before it",
    "normalized token beside",
    "metaspace before the first stretch",
    "longer token",
    "token across",
    "token that takes the space behind it",
    "words of GPT-2",
    "words of Llama 3",
    "words of Tekken",
    "digits, then words",
}
TEXTS = st.lists(
    st.sampled_from(
        ["<|x|>", "<y>", "ab", "abc", "a", "b", "c", " ", "  ", "\n", "\n\n", "|>", "<|", "x", "yy", "dd", "1"]
    ),
    max_size=8,
).map("".join)


@lru_cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=KINDS[kind][0]()))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(head=TEXTS.map(lambda text: text + "<|x|>"), probes=st.lists(TEXTS, min_size=1, max_size=3), rest=TEXTS)
def test_tokens_behind_a_head_are_those_of_the_whole(kind: str, head: str, probes: list[str], rest: str) -> None:
    tokenizer = tokenizer_of(kind)
    heads = TextHeads(tokenizer)
    known = heads.common([head + probe for probe in probes])
    if known is not None:
        text = known.text + rest
        assert heads.encode(known, text) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_which_tokenizers_have_heads(kind: str) -> None:
    known = TextHeads(tokenizer_of(kind)).common(["ab<|x|> abc<|x|>a", "ab<|x|> abc<|x|> 1", "ab<|x|> abc<|x|>\n"])
    ends_behind_token = known is not None and known.start == len("ab<|x|> abc<|x|>")
    assert ends_behind_token == KINDS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_which_tokenizers_have_heads_that_end_between_words(kind: str) -> None:
    heads = TextHeads(tokenizer_of(kind))
    known = heads.common(["<|x|>ab b d\n\na", "<|x|>ab b d\n\n 1", "<|x|>ab b d\n\n\n"])
    assert (known is not None and known.num_lead_tokens > 0) == (kind in WITH_GAPS)
    if kind in WITH_GAPS:
        assert known is not None
        assert known.start >= len("<|x|>ab ")


@pytest.mark.parametrize("kind", sorted(WITH_GAPS))
@settings(max_examples=150, deadline=None)
@given(head=TEXTS, token=st.sampled_from(["", "<|", "<", "<|x|>", "|", "a"]), rests=st.lists(TEXTS, min_size=2))
def test_tokens_behind_a_gap_between_words_are_those_of_the_whole(
    kind: str, head: str, token: str, rests: list[str]
) -> None:
    tokenizer = tokenizer_of(kind)
    heads = TextHeads(tokenizer)
    # What could have been an added token's start, and what could be its end.
    texts = [head + token + rest for rest in (*rests, *("|x|>" + rest for rest in rests))]
    known = heads.common(texts[:2])
    for text in texts:
        if known is not None and known.starts(text):
            assert heads.encode(known, text) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", sorted(WITH_GAPS))
def test_no_gap_is_between_letters_that_may_merge(kind: str) -> None:
    # "b" merges with "c" before "a" with "b": whether a token ends behind "a" depends on what follows.
    texts = ["<|x|>dabc", "<|x|>dab1", "<|x|>dabd"]
    known = TextHeads(tokenizer_of(kind)).common(texts)
    assert known is None or known.start + (known.num_lead_tokens > 0) <= len("<|x|>d")
    for text in texts if known is not None else []:
        whole = tokenizer_of(kind).encode(text, add_special_tokens=False)
        assert TextHeads(tokenizer_of(kind)).encode(known, text) == whole


def test_steps_written_in_python_are_not_trusted() -> None:
    class Step:
        def pre_tokenize(self, text: Any) -> None:
            pass

    backend = plain()
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Step())
    tokenizer = tokenizer_of("plain")
    odd = Tokenizer.__new__(Tokenizer)
    odd.backend, odd.added_tokens = backend, tokenizer.added_tokens
    assert TextHeads(odd).common(["<|x|>a", "<|x|>b"]) is None


@settings(max_examples=100, deadline=None)
@given(system=st.text(max_size=30), texts=st.lists(st.text(max_size=30), min_size=1, max_size=3))
@pytest.mark.parametrize("template", [MARKED, FOLDED, BARE])
def test_known_prompts_get_the_tokens_of_the_whole_text(
    tokenizer: Tokenizer, template: str, system: str, texts: list[str]
) -> None:
    renderer = ChatRenderer(tokenizer, template)
    for text in texts:
        chat = renderer.render([{"role": "system", "content": system}, user(text)])
        if "<|im_" not in system + text:
            assert chat.prompt_token_ids == tokenizer.encode(chat.text, add_special_tokens=False)


@pytest.mark.parametrize("template", [TOOLS, FOLDED, BARE])
def test_a_known_prompt_is_not_tokenised_again(
    tokenizer: Tokenizer, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = ChatRenderer(tokenizer, template)
    system = {**SYSTEM, "content": SYSTEM["content"] * 200}
    first = renderer.render([system, user("one")])
    encode, sizes = tokenizer.encode, []

    def watched(text: str, add_special_tokens: bool = True) -> list[int]:
        sizes.append(len(text))
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", watched)
    for text in ("two", "\n3", " \u00e9\U0001f600", ""):
        chat = renderer.render([system, user(text)])
        assert chat.num_system_tokens == first.num_system_tokens
    assert len(sizes) == 4
    assert max(sizes) < 100


def test_a_head_counts_only_for_texts_that_start_with_it(tokenizer: Tokenizer) -> None:
    # The template shows the day's greeting before the system message, but only to those who ask for it.
    template = "{% if messages[-1].content == 'hi' %}Good day. {% endif %}" + MARKED
    renderer = ChatRenderer(tokenizer, template)
    usual = renderer.render([SYSTEM, user("hello")])
    other = renderer.render([SYSTEM, user("hi")])
    assert usual.num_system_tokens is not None
    assert other.num_system_tokens is None
    assert other.prompt_token_ids == tokenizer.encode(other.text, add_special_tokens=False)
