"""What the system-prompt pool costs the host: planning a step, routing a request, finding where a system part ends.

    python benchmarks/benchmark_pool.py [--json FILE]

Planning is timed with few and with many registered prompts, in turns, over the same running sequences; nothing here
needs a device.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vllm.config import SchedulerConfig, SystemPromptConfig
from vllm.core.block_manager import BlockManager
from vllm.core.scheduler import Scheduler
from vllm.core.system_prompt_pool import SystemPromptPool
from vllm.kv_cache.extents import Extent, PinnedBlockPool
from vllm.sampling_params import SamplingParams
from vllm.sequence import Sequence
from vllm.transformers_utils.chat_template import ChatRenderer
from vllm.transformers_utils.config import resolve_model
from vllm.transformers_utils.system_parts import SystemPart
from vllm.transformers_utils.text_heads import TextHead
from vllm.transformers_utils.tokenizer import load_tokenizer

BLOCK, PROMPT_TOKENS, MAX_LEN = 16, 64, 4096
SHARED = 10
# In the manner of Gemma and Mistral: the system text stands in the user's turn, without a control token behind it.
FOLDED = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content + '\n\n' %}{% else %}<|im_start|>{{ m.role }}\n"
    "{{ ns.system + m.content | trim }}<|im_end|>\n{% set ns.system = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_scheduler(num_prompts: int, num_running: int, ttl: float | None) -> Scheduler:
    """A scheduler with so many pinned prompts, and sequences that decode and read the first ten of them."""
    num_blocks = num_prompts * PROMPT_TOKENS // BLOCK + num_running * 80 + MAX_LEN // BLOCK
    blocks = BlockManager(num_blocks, BLOCK)
    pinned = PinnedBlockPool(num_blocks, num_blocks, MAX_LEN // BLOCK)
    pool = SystemPromptPool(SystemPromptConfig(ttl=ttl), pinned, BLOCK, on_release=blocks.give_back)
    config = SchedulerConfig(max_num_seqs=num_running, max_num_batched_tokens=8192)
    scheduler = Scheduler(config, blocks, pool, MAX_LEN)
    rng = random.Random(0)
    prompts = [[rng.randrange(50_000) for _ in range(PROMPT_TOKENS)] for _ in range(num_prompts)]
    for i in range(num_running):
        prompt = prompts[i % min(SHARED, num_prompts)]
        seq = Sequence(f"r{i}", [*prompt, i], SamplingParams(max_tokens=2000, ignore_eos=True))
        scheduler.add([seq], PROMPT_TOKENS)
    settle(scheduler, until=lambda: len(scheduler.running) == num_running)
    # The place in memory of the others does not matter here: they are put one below the other, as in a long life.
    for prompt in prompts[SHARED:]:
        new = pool.add(prompt, ttl=ttl)
        extent = Extent(pinned.num_blocks - pinned.pinned_blocks - PROMPT_TOKENS // BLOCK, PROMPT_TOKENS // BLOCK)
        blocks.vacate([extent], scheduler.running)
        pool.place(new, (extent,))
        pool.end_prefill(new)
    return scheduler


def settle(scheduler: Scheduler, until: Callable[[], bool]) -> None:
    while not until():
        step(scheduler)


def step(scheduler: Scheduler) -> float:
    """Seconds that planning a step took."""
    started = time.perf_counter()
    plan = scheduler.schedule()
    seconds = time.perf_counter() - started
    scheduler.postprocess([7 if samples else -1 for samples in plan.samples])
    return seconds


def planning(few: int, many: int, num_running: int, steps: int) -> dict[str, float]:
    schedulers = {"few": make_scheduler(few, num_running, 3600.0), "many": make_scheduler(many, num_running, 3600.0)}
    seconds: dict[str, list[float]] = {"few": [], "many": []}
    for _ in range(steps):
        for name, scheduler in schedulers.items():
            seconds[name].append(step(scheduler))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "few_prompts": few,
        "many_prompts": many,
        "running": num_running,
        "schedule_few_us": medians["few"] * 1e6,
        "schedule_many_us": medians["many"] * 1e6,
        "schedule_ratio": medians["many"] / medians["few"],
    }


def timed(function: Callable[[], object], repeats: int) -> float:
    """Median microseconds of a call."""
    values = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        values.append(time.perf_counter() - started)
    return statistics.median(values) * 1e6


def routing(num_tokens: int, num_prompts: int) -> float:
    """Microseconds to attach a request to one of many known prompts of so many tokens."""
    num_blocks = 2 * num_prompts * num_tokens // BLOCK
    pinned = PinnedBlockPool(num_blocks, num_blocks, 0)
    pool = SystemPromptPool(SystemPromptConfig(), pinned, BLOCK, on_release=lambda e: None)
    rng = random.Random(0)
    head = [rng.randrange(50_000) for _ in range(num_tokens // 2)]
    for _ in range(num_prompts):
        prompt = head + [rng.randrange(50_000) for _ in range(num_tokens - len(head))]
        new = pool.add(prompt)
        size = num_tokens // BLOCK
        pool.place(new, (Extent(pinned.num_blocks - pinned.pinned_blocks - size, size),))
        pool.end_prefill(new)
    # As they come from the socket: equal numbers, other objects.
    ids = json.loads(json.dumps([*prompt, 1, 2, 3]))

    def route() -> None:
        seq = Sequence("r", ids)
        pool.route(seq, num_tokens)
        pool.detach(seq)

    return timed(route, 200)


def boundaries(model: str | None, template: str | None, num_tokens: int) -> dict[str, float]:
    """Microseconds of turning a chat with a known system prompt into tokens, those of finding where that prompt ends
    therein, and those of tokenising the whole text, which the first no longer includes."""
    tokenizer = load_tokenizer(resolve_model(model, None, True)[1])
    renderer = ChatRenderer(tokenizer, template)
    rng = random.Random(0)
    words = [rng.choice(("tide", "lamp", "oak", "ferry", "ledger", "salt", "bridge")) for _ in range(num_tokens)]
    chat = [{"role": "system", "content": " ".join(words)}, {"role": "user", "content": "Hello"}]
    find = renderer._system_part
    finding: list[float] = []

    class WatchedPart(NamedTuple):
        part: SystemPart

        @property
        def head(self) -> TextHead | None:
            return self.part.head

        def size_in(self, ids: list[int], head: TextHead | None) -> int | None:
            started = time.perf_counter()
            size = self.part.size_in(ids, head)
            finding[-1] += time.perf_counter() - started
            return size

    def watched(*args: Any) -> WatchedPart:
        started = time.perf_counter()
        part = find(*args)
        finding.append(time.perf_counter() - started)
        return WatchedPart(part)

    renderer._system_part = watched  # type: ignore[method-assign, assignment]
    rendered = renderer.render(chat)
    finding.clear()
    # As it comes from the socket: equal texts, other objects.
    body = json.dumps(chat)
    return {
        "system_tokens": float(rendered.num_system_tokens or 0),
        "tokenise_all_us": timed(lambda: tokenizer.encode(rendered.text, add_special_tokens=False), 30),
        "render_us": timed(lambda: renderer.render(json.loads(body)), 100),
        "boundary_us": statistics.median(finding) * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="whose tokenizer and chat template to use; the default model if not given")
    parser.add_argument("--prompts", type=int, default=10_000, help="registered prompts (default: %(default)s)")
    parser.add_argument("--running", type=int, default=1000, help="running sequences (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    logging.getLogger("vllm").setLevel(logging.WARNING)
    results: dict[str, object] = {"planning": planning(SHARED, args.prompts, args.running, args.steps)}
    results["routing_us"] = {str(n): routing(n, 100) for n in (256, 1024, 4096, 8192)}
    sizes = (256, 1024, 4096, 8192, 32_768)
    results["boundaries"] = [boundaries(args.model, None, n) for n in sizes]
    results["boundaries_in_users_turn"] = [boundaries(args.model, FOLDED, n) for n in sizes]
    print(json.dumps(results, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
