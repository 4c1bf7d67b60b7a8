"""Requests to measure with: made here from a seed, or read from a file."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm.exceptions import StartupError
from vllm.transformers_utils.tokenizer import Tokenizer

_NUM_WORDS = 2048

# What conversations that people shared look like, in tokens: the median and the spread of log-normal lengths, and the
# limits that vLLM's benchmark puts on ShareGPT's.
_CHAT_PROMPT = (60, 1.3)
_CHAT_OUTPUT = (170, 0.9)
_CHAT_SHORTEST = 4
_CHAT_LONGEST_PROMPT = 1024
_CHAT_LONGEST = 2048


@dataclass(frozen=True)
class Sample:
    """One request: its text, how many tokens that is for a completion, and how many tokens to generate."""

    prompt: str
    prompt_len: int
    output_len: int


def add_dataset_arguments(parser: argparse.ArgumentParser, num_prompts: int = 1000) -> None:
    group = parser.add_argument_group("data set")
    group.add_argument(
        "--dataset-name", choices=list(_DATASETS), default="random", help="kind of requests (default: %(default)s)"
    )
    group.add_argument("--dataset-path", metavar="FILE", help="ShareGPT's JSON, or custom: lines of JSON with `prompt`")
    group.add_argument("--num-prompts", type=int, default=num_prompts, help="requests (default: %(default)s)")
    group.add_argument("--input-len", type=int, help="prompt tokens of each request, whatever the data set")
    group.add_argument("--output-len", type=int, help="output tokens of each request, whatever the data set")
    for name, value, text in (
        ("random-input-len", 1024, "prompt tokens"),
        ("random-output-len", 128, "output tokens"),
        ("random-prefix-len", 0, "tokens at the head that all prompts share"),
        ("prefix-repetition-prefix-len", 256, "tokens of each shared prefix"),
        ("prefix-repetition-suffix-len", 256, "tokens after the prefix"),
        ("prefix-repetition-num-prefixes", 10, "different prefixes"),
        ("prefix-repetition-output-len", 128, "output tokens"),
    ):
        group.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="lengths are drawn from (1-R) to (1+R) times the mean (default: %(default)s)",
    )
    group.add_argument("--sharegpt-output-len", type=int, help="output tokens in place of those of the conversation")
    group.add_argument("--custom-output-len", type=int, default=256, help="output tokens (default: %(default)s)")


def make_samples(args: argparse.Namespace, tokenizer: Tokenizer, seed: int) -> list[Sample]:
    """The requests that the flags of `add_dataset_arguments` ask for; the same ones for the same seed.

    Raises:
        StartupError: a value is not allowed, or the file is not what it should be.
    """
    if args.num_prompts < 1:
        raise StartupError(f"--num-prompts must be at least 1, got {args.num_prompts}.")
    for flag in ("input_len", "output_len"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise StartupError(f"--{flag.replace('_', '-')} must be at least 1, got {value}.")
    if not 0 <= args.random_range_ratio < 1:
        raise StartupError(f"--random-range-ratio must be from 0 to below 1, got {args.random_range_ratio}.")
    return _DATASETS[args.dataset_name](args, _TextMaker(tokenizer, random.Random(seed)))


class _TextMaker:
    """Texts of exactly so many tokens.

    They are made of words that are one token each, wherever they stand, as the words of most vocabularies are that
    begin with a space.
    """

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.overhead = len(tokenizer.encode(""))
        ids = list(range(tokenizer.vocab_size))
        rng.shuffle(ids)
        self._words: list[str] = []
        for token_id in ids:
            text = tokenizer.token_text(token_id)
            if text.startswith(" ") and text[1:].isascii() and text[1:].isalpha() and self.num_tokens(text) == 1:
                self._words.append(text)
                if len(self._words) == _NUM_WORDS:
                    break
        if not self._words:
            raise StartupError("This tokenizer has no words that are one token, which made-up prompts consist of.")

    def num_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def text(self, num_tokens: int) -> str:
        words = self.rng.choices(self._words, k=max(1, num_tokens))
        text = "".join(words)
        # Where neighbours have merged after all, words are added until the length is right.
        while (missing := num_tokens - self.num_tokens(text)) > 0:
            text += "".join(self.rng.choices(self._words, k=missing))
        return text

    def sample(self, text: str, output_len: int) -> Sample:
        return Sample(text, len(self.tokenizer.encode(text)), output_len)

    def spread(self, mean: int, ratio: float) -> int:
        return max(1, self.rng.randint(int(mean * (1 - ratio)), int(mean * (1 + ratio))))


def _random(args: argparse.Namespace, maker: _TextMaker) -> list[Sample]:
    shared = maker.text(args.random_prefix_len) if args.random_prefix_len > 0 else ""
    samples = []
    for _ in range(args.num_prompts):
        own = maker.spread(args.input_len or args.random_input_len, args.random_range_ratio) - maker.overhead
        output_len = maker.spread(args.output_len or args.random_output_len, args.random_range_ratio)
        samples.append(maker.sample(shared + maker.text(max(1, own)), output_len))
    return samples


def _prefix_repetition(args: argparse.Namespace, maker: _TextMaker) -> list[Sample]:
    prefixes = [
        maker.text(args.prefix_repetition_prefix_len) for _ in range(max(1, args.prefix_repetition_num_prefixes))
    ]
    suffix_len = args.input_len or args.prefix_repetition_suffix_len
    output_len = args.output_len or args.prefix_repetition_output_len
    samples = [
        maker.sample(prefixes[i % len(prefixes)] + maker.text(suffix_len), output_len) for i in range(args.num_prompts)
    ]
    maker.rng.shuffle(samples)
    return samples


def _sharegpt(args: argparse.Namespace, maker: _TextMaker) -> list[Sample]:
    """Conversations of a file, or without one texts of the lengths that such conversations have."""
    output_len = args.output_len or args.sharegpt_output_len
    if args.dataset_path is not None:
        return _from_conversations(args, maker, output_len)

    def length(median: int, spread: float, longest: int) -> int:
        return min(longest, max(_CHAT_SHORTEST, round(median * maker.rng.lognormvariate(0.0, spread))))

    samples = []
    for _ in range(args.num_prompts):
        prompt_len = args.input_len or length(*_CHAT_PROMPT, _CHAT_LONGEST_PROMPT)
        made = length(*_CHAT_OUTPUT, max(_CHAT_SHORTEST, _CHAT_LONGEST - prompt_len))
        samples.append(maker.sample(maker.text(max(1, prompt_len - maker.overhead)), output_len or made))
    return samples


def _from_conversations(args: argparse.Namespace, maker: _TextMaker, output_len: int | None) -> list[Sample]:
    content = _parse(args.dataset_path, _read(args.dataset_path))
    if not isinstance(content, list):
        raise StartupError(f"--dataset-path {args.dataset_path} must hold a JSON list of conversations.")
    maker.rng.shuffle(content)
    samples: list[Sample] = []
    for entry in content:
        turns = entry.get("conversations", []) if isinstance(entry, dict) else []
        texts = [turn["value"] for turn in turns[:2] if isinstance(turn, dict) and isinstance(turn.get("value"), str)]
        if len(texts) < 2:
            continue
        sample = maker.sample(texts[0], output_len or maker.num_tokens(texts[1]))
        long_enough = min(sample.prompt_len, sample.output_len) >= _CHAT_SHORTEST or output_len is not None
        total = sample.prompt_len + sample.output_len
        if long_enough and sample.prompt_len <= _CHAT_LONGEST_PROMPT and total <= _CHAT_LONGEST:
            samples.append(sample)
    return _repeated(samples, args)


def _custom(args: argparse.Namespace, maker: _TextMaker) -> list[Sample]:
    if args.dataset_path is None:
        raise StartupError("--dataset-name custom needs --dataset-path FILE, with a line of JSON for each request.")
    samples = []
    for i, line in enumerate(_read(args.dataset_path).splitlines(), start=1):
        if not line.strip():
            continue
        entry = _parse(f"{args.dataset_path} line {i}", line)
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise StartupError(f'--dataset-path {args.dataset_path} line {i} must be {{"prompt": "…"}}.')
        samples.append(maker.sample(entry["prompt"], args.output_len or args.custom_output_len))
    return _repeated(samples, args)


def _repeated(samples: list[Sample], args: argparse.Namespace) -> list[Sample]:
    if not samples:
        raise StartupError(f"--dataset-path {args.dataset_path} holds no usable request.")
    return [samples[i % len(samples)] for i in range(args.num_prompts)]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise StartupError(f"--dataset-path {path} cannot be read: {exc}.") from None


def _parse(where: str, text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as exc:
        raise StartupError(f"--dataset-path {where} is not JSON: {exc}.") from None


_DATASETS: dict[str, Callable[[argparse.Namespace, _TextMaker], list[Sample]]] = {
    "random": _random,
    "sharegpt": _sharegpt,
    "prefix_repetition": _prefix_repetition,
    "custom": _custom,
}
