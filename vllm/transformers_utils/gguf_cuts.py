"""How byte-level BPE cuts text before merging.

A GGUF file names the way (`tokenizer.ggml.pre`) instead of describing it; the patterns here are what those names stand
for.
"""

from __future__ import annotations

from tokenizers import Regex, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + "|" + _TAIL % r"\p{N}{1,3}"
_QWEN2 = _CONTRACTIONS + "|" + _TAIL % r"\p{N}"
_SINGLE_DIGITS = (r"\p{N}", _GPT2)
# Words of capitals, then small letters, as o200k and Tekken cut them.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
_WORD_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = _WORDS % (_CONTRACTIONS + "?", _CONTRACTIONS + "?", r"\p{N}{1,3}") + _WORD_TAIL
_TEKKEN = _WORDS % ("", "", r"\p{N}") + _WORD_TAIL
_UNNAMED = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

PATTERNS: dict[str, tuple[str, ...]] = {
    "default": _UNNAMED,
    "gpt-2": (_GPT2,),
    "olmo": (_GPT2,),
    "phi-2": (_GPT2,),
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "command-r": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "glm4": (_LLAMA3,),
    "chatglm-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "gpt-4o": (_O200K,),
    "tekken": (_TEKKEN,),
}
"""Name → patterns, applied one after the other to the pieces that the last one left."""

WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""A piece that is a token as it stands is not merged; these also start with a BOS token unless the file says no."""


def cuts(name: str) -> list[pre_tokenizers.PreTokenizer]:
    """The steps that a name of `PATTERNS` stands for."""
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[name]]
