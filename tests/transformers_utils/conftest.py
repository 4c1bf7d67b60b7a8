"""Tokenizers that several tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from gguf_files import write_gguf

from vllm.transformers_utils.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(default_model_path: str) -> Tokenizer:
    """The default model's."""
    return load_tokenizer(default_model_path)


@pytest.fixture(scope="session")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer network that knows bytes, a few words, three control tokens and `<tag>`."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture(scope="session")
def small_tokenizer(small_gguf: Path) -> Tokenizer:
    return load_tokenizer(str(small_gguf))


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> Tokenizer:
    """Words that begin with a mark for a space, bytes for what it does not know, `<s>` and `</s>`."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581abcHeliow."]
    pieces += ["He", "\u2581He", "ll", "\u2581a", "\u2581b"]
    merges = [("H", "e"), ("\u2581", "He"), ("l", "l"), ("\u2581", "a"), ("\u2581", "b")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    )
