"""Builds a tokenizer from a GGUF file's vocabulary, so that its tokens are llama.cpp's.

Two kinds of vocabulary are read: byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`).
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vllm.exceptions import StartupError
from vllm.logger import init_logger
from vllm.transformers_utils.gguf import GGUFFile
from vllm.transformers_utils.gguf_cuts import PATTERNS, WHOLE_WORDS_FIRST, cuts

logger = init_logger(__name__)

_SPACE = "\u2581"
"""What SentencePiece writes for a space."""

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_NO_TOKEN = 0xFFFFFFFF


def build_gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The file's tokenizer, with its chat templates and its context length as the length limit.

    Raises:
        StartupError: the file has no vocabulary, or one of a kind that cannot be built.
    """
    kind = file.get("tokenizer.ggml.model")
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    if kind not in ("gpt2", "llama"):
        raise StartupError(
            f"{file.path} has a tokenizer of kind {kind!r}; read from GGUF are byte-level BPE ('gpt2') and "
            "SentencePiece's BPE ('llama'). Give a directory with tokenizer.json by --tokenizer."
        )
    if not tokens or types is None or len(types) != len(tokens):
        raise StartupError(f"{file.path} lacks tokens or token types.")
    build = _byte_level if kind == "gpt2" else _sentencepiece
    try:
        tokenizer, adds_bos = build(file, tokens)
    except StartupError:
        raise
    except Exception as error:  # the library raises bare Exception for merges that are not in the vocabulary
        raise StartupError(f"{file.path} has a damaged vocabulary: {error}.") from error
    named = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=named[kind], normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in named and token
        ]
    )
    ends = _ends(file, tokens, adds_bos)
    trims = [processors.ByteLevel(trim_offsets=False)] if kind == "gpt2" else []
    tokenizer.post_processor = processors.Sequence([*trims, ends])
    return _wrap(file, tokenizer, tokens)


def _byte_level(file: GGUFFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether texts begin with BOS if the file does not say."""
    name, merges = file.get("tokenizer.ggml.pre"), file.get("tokenizer.ggml.merges")
    if merges is None:
        raise StartupError(f"{file.path} lacks merges.")
    if name is None:
        logger.warning(
            "%s does not say how text is cut into words before merging (tokenizer.ggml.pre). This is a GUESS, as older "
            "versions of llama.cpp made it: tokens may differ from those that the model was trained with, and answers "
            "get worse. Give the model's own tokenizer by --tokenizer, or convert the file anew.",
            file.path,
        )
        name = "default"
    if name not in PATTERNS:
        raise StartupError(
            f"{file.path} cuts text as {name!r}; known are {', '.join(sorted(PATTERNS))}. Give a directory with "
            "tokenizer.json by --tokenizer."
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    whole_words = name in WHOLE_WORDS_FIRST
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=whole_words))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts(name), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, whole_words


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """As `_byte_level`.

    SentencePiece joins the neighbours whose union has the highest score; a list of merges in the order of the scores
    says the same. Tokens that stand for themselves (control, user-defined) take no part in it.
    """
    scores, types = file.get("tokenizer.ggml.scores"), file.get("tokenizer.ggml.token_type")
    if scores is None or len(scores) != len(tokens):
        raise StartupError(f"{file.path} lacks scores of its tokens.")
    vocab = {token: i for i, token in enumerate(tokens)}
    joined = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == 1}
    merges = [
        (score, left, right)
        for token, score in joined.items()
        for left, right in ((token[:i], token[i:]) for i in range(1, len(token)))
        if left in joined and right in joined
    ]
    # Of one token's halves, the longer left one first: the others then do not arise.
    merges.sort(key=lambda merge: (-merge[0], vocab[merge[1] + merge[2]], -len(merge[1])))
    unknown = file.get("tokenizer.ggml.unknown_token_id", 0)
    unk_token = tokens[unknown] if 0 <= unknown < len(tokens) else None
    pairs = [(left, right) for _, left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    prefixed = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    to_marks = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_marks]) if prefixed else to_marks
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer, True


def _ends(file: GGUFFile, tokens: list[str], adds_bos: bool) -> processors.PostProcessor:
    bos, eos = _special(file, tokens, "bos"), _special(file, tokens, "eos")
    add_bos = file.get("tokenizer.ggml.add_bos_token", adds_bos) and bos is not None
    add_eos = file.get("tokenizer.ggml.add_eos_token", False) and eos is not None
    parts = ([f"{bos}:0"] if add_bos else []) + ["$A:0"] + ([f"{eos}:0"] if add_eos else [])
    used = [token for token, added in ((bos, add_bos), (eos, add_eos)) if added and token is not None]
    return processors.TemplateProcessing(
        single=parts, special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(used)]
    )


def _special(file: GGUFFile, tokens: list[str], name: str) -> str | None:
    token_id = file.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None or token_id == _NO_TOKEN:
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
    hf.chat_template = _chat_template(file)
    return hf


def _chat_template(file: GGUFFile) -> str | dict[str, str] | None:
    """The template, or all by name where the file has more than one: `tool_use` is used where tools are given."""
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    plain: str | None = file.get("tokenizer.chat_template")
    if not named:
        return plain
    return named if plain is None else {"default": plain} | named
