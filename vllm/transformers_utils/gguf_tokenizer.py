"""Builds a byte-level BPE tokenizer from a GGUF file's vocabulary, so that its tokens are llama.cpp's.

A GGUF file names the way text is cut before merging (`tokenizer.ggml.pre`) instead of describing it; the patterns
here are what those names stand for.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vllm.exceptions import StartupError
from vllm.transformers_utils.gguf import GGUFFile

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + "|" + _TAIL % r"\p{N}{1,3}"
_QWEN2 = _CONTRACTIONS + "|" + _TAIL % r"\p{N}"
_UNNAMED = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": _UNNAMED,
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
}
"""Name → patterns, applied one after the other to the pieces that the last one left."""

_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3")
"""A piece that is a token as it stands is not merged; these also start with a BOS token unless the file says no."""

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def build_gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The file's tokenizer, with its chat template and its context length as the length limit.

    Raises:
        StartupError: the file has no vocabulary, or one of a kind that cannot be built.
    """
    kind, name = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise StartupError(
            f"{file.path} has a tokenizer of kind {kind!r}; only byte-level BPE ('gpt2') is read from GGUF. Give a "
            "directory with tokenizer.json by --tokenizer."
        )
    if name not in _PATTERNS:
        raise StartupError(
            f"{file.path} cuts text as {name!r}; known are {', '.join(sorted(_PATTERNS))}. Give a directory with "
            "tokenizer.json by --tokenizer."
        )
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    merges = file.get("tokenizer.ggml.merges")
    if not tokens or merges is None or types is None or len(types) != len(tokens):
        raise StartupError(f"{file.path} lacks tokens, merges or token types.")
    return _wrap(file, _backend(file, name, tokens, types, merges), tokens)


def _backend(file: GGUFFile, name: str, tokens: list[str], types: list[int], merges: list[str]) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        model = models.BPE(vocab, pairs, ignore_merges=name in _WHOLE_WORDS_FIRST)
    except Exception as error:  # the library raises bare Exception for merges that are not in the vocabulary
        raise StartupError(f"{file.path} has a damaged vocabulary: {error}.") from error
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS[name]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    named = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=named[kind], normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in named and token
        ]
    )
    tokenizer.post_processor = _ends(file, tokens, name)
    return tokenizer


def _ends(file: GGUFFile, tokens: list[str], name: str) -> processors.PostProcessor:
    bos, eos = _special(file, tokens, "bos"), _special(file, tokens, "eos")
    add_bos = file.get("tokenizer.ggml.add_bos_token", name in _WHOLE_WORDS_FIRST) and bos is not None
    add_eos = file.get("tokenizer.ggml.add_eos_token", False) and eos is not None
    parts = ([f"{bos}:0"] if add_bos else []) + ["$A:0"] + ([f"{eos}:0"] if add_eos else [])
    used = [token for token, added in ((bos, add_bos), (eos, add_eos)) if added and token is not None]
    template = processors.TemplateProcessing(
        single=parts, special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(used)]
    )
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])


def _special(file: GGUFFile, tokens: list[str], name: str) -> str | None:
    token_id = file.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None or token_id == 0xFFFFFFFF:
        return None
    if not 0 <= token_id < len(tokens):
        raise StartupError(f"{file.path} names token {token_id} as {name}, beyond its vocabulary of {len(tokens)}.")
    return tokens[token_id]


def _wrap(file: GGUFFile, tokenizer: Tokenizer, tokens: list[str]) -> PreTrainedTokenizerFast:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special: dict[str, Any] = {key: _special(file, tokens, name) for key, name in names.items()}
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=file.get(f"{file.get('general.architecture')}.context_length", int(1e30)),
        clean_up_tokenization_spaces=False,
        **special,
    )
    hf.chat_template = file.get("tokenizer.chat_template")
    return hf
