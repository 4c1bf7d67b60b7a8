"""What the window group keeps: its arithmetic at the edges, and who holds its blocks."""

from __future__ import annotations

import pytest

from vllm.core.block_manager import BlockManager
from vllm.core.pinned_prompt import BlockCount
from vllm.core.window_blocks import HOLE, WindowBlocks
from vllm.kv_cache.extents import Extent
from vllm.kv_cache.windows import KVMemory, WindowLayout
from vllm.sequence import Sequence

BLOCK = 4
WINDOW = 9


def make_blocks(num_window_blocks: int = 16) -> tuple[BlockManager, WindowBlocks]:
    windows = WindowBlocks(WindowLayout(WINDOW, BLOCK, 8), num_window_blocks)
    return BlockManager(32, BLOCK, windows=windows), windows


def compute(blocks: BlockManager, seq: Sequence, chunk: int) -> Sequence:
    """Computes `seq` in chunks of so many tokens."""
    while seq.num_computed_tokens < seq.num_tokens:
        end = min(seq.num_tokens, seq.num_computed_tokens + chunk)
        assert blocks.grow(seq, end) is not None
        seq.num_computed_tokens = end
        blocks.commit(seq)
    return seq


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 1024])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 1022, 1023, 1024, 1025, 5000])
def test_a_pin_keeps_its_window_in_whole_blocks(window: int, num_tokens: int) -> None:
    layout = WindowLayout(window, 16, 2048)
    kept_from = layout.first_of_tail(num_tokens) * 16
    assert kept_from <= max(0, num_tokens - window + 1), "the token behind it finds all that it reads"
    assert num_tokens - kept_from <= max(1, min(num_tokens, window - 1)) + 15, "and no more than a block besides"
    assert layout.tail_blocks(num_tokens) == -(-num_tokens // 16) - layout.first_of_tail(num_tokens)


# Bytes of a block of 16 tokens over the layers without and with a window, and W; bfloat16.
MEMORY = {
    "Gemma 3 27B": KVMemory(0, 10 * 16 * 8192, 1024, 52 * 16 * 8192),
    "Gemma 3 4B": KVMemory(0, 5 * 16 * 4096, 1024, 29 * 16 * 4096),
    "Gemma 3 270M": KVMemory(0, 3 * 16 * 1024, 512, 15 * 16 * 1024),
    "Gemma 2 9B": KVMemory(0, 21 * 16 * 8192, 4096, 21 * 16 * 8192),
    "gpt-oss 20B": KVMemory(0, 12 * 16 * 2048, 128, 12 * 16 * 2048),
}


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("num_bytes", [3 * 10**9, 3 * 10**10])
def test_split_takes_no_more_than_there_is_and_keeps_the_longest_sequence(name: str, num_bytes: int) -> None:
    memory = MEMORY[name]
    layout = WindowLayout(memory.window or 0, 16, 2048)
    full, window = layout.split(num_bytes, memory, 8192)
    assert 0 <= num_bytes - full * memory.block_bytes - window * memory.window_block_bytes < memory.block_bytes
    assert full >= 8192 // 16 and full > window >= layout.most_blocks(8192)
    assert abs(layout.blocks_beside(full, memory, 8192) - window) <= 8


@pytest.mark.parametrize(("name", "gain"), list(zip(MEMORY, (1.5, 1.5, 1.45, 1.1, 1.7), strict=True)))
def test_split_takes_little_from_short_texts_and_gives_long_ones_more(name: str, gain: float) -> None:
    """As compared with keeping everything in all layers; and behind a pin, which window layers hardly keep."""
    memory, num_bytes, longest = MEMORY[name], 10**11, 131072
    layout = WindowLayout(memory.window or 0, 16, 2048)
    full, within = layout.split(num_bytes, memory, longest)
    whole = num_bytes / (memory.block_bytes + memory.window_block_bytes)

    def number(num_tokens: int, pin: BlockCount) -> float:
        """Texts of so many tokens that fit beside a pin."""
        blocks = -(-num_tokens // 16)
        return min((full - pin.full) / blocks, (within - pin.window) / min(blocks, layout.blocks_behind + 2))

    gains = [
        number(num_tokens, BlockCount(0)) * (num_tokens / 16) / whole for num_tokens in (512, 1024, 4096, 16384, 65536)
    ]
    assert gains[0] >= 0.899 and gains == sorted(gains) and gains[-1] >= gain
    pin = BlockCount.of(int(0.4 * whole) * 16, 16, layout)
    assert number(512, pin) * 32 >= 1.1 * (whole - pin.full)


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("times", [1.01, 1.2, 2.0, 10.0])
def test_what_can_be_pinned_is_so_in_either_group(name: str, times: float) -> None:
    """In a cache that holds little more than one sequence of the longest length, too."""
    memory = MEMORY[name]
    layout = WindowLayout(memory.window or 0, 16, 2048)
    longest, most = 8192 // 16, layout.most_blocks(8192)
    least = longest * memory.block_bytes + most * memory.window_block_bytes
    full, within = layout.split(int(times * least), memory, 8192)
    share = layout.share(memory, 8192)
    assert full >= longest and within >= most
    assert within - most >= share * (full - longest) - 2
    assert full - longest >= min(longest, within - most) - 1


@pytest.mark.parametrize("name", MEMORY)
def test_texts_no_longer_than_a_window_need_as_much_of_either_group(name: str) -> None:
    memory = MEMORY[name]
    layout = WindowLayout(memory.window or 0, 16, 16)
    full, within = layout.split(10**9, memory, (memory.window or 0) // 2)
    assert 0 <= full - within <= memory.window_block_bytes // memory.block_bytes + 1


@pytest.mark.parametrize("name", ["Gemma 3 27B", "Gemma 3 4B", "Gemma 3 270M"])
def test_a_long_pin_takes_less_than_a_third_with_the_shape_of_gemma_3(name: str) -> None:
    memory = MEMORY[name]
    layout = WindowLayout(memory.window or 0, 16, 2048)
    size = BlockCount.of(32768, 16, layout)
    taken = size.full * memory.block_bytes + size.window * memory.window_block_bytes
    assert taken <= 0.3 * (32768 // 16) * (memory.block_bytes + memory.window_block_bytes)


def test_a_request_gives_back_what_lies_behind_its_window() -> None:
    blocks, windows = make_blocks()
    seq = compute(blocks, Sequence("a", range(40)), chunk=8)
    assert windows.num_used_blocks < blocks.num_used_blocks == 10
    assert seq.window_table[:4] == [HOLE] * 4 and len(seq.window_table) == 10
    windows.check_integrity([seq], set())
    blocks.free(seq)
    assert windows.num_used_blocks == 0


def test_usage_is_that_of_the_fuller_group() -> None:
    blocks, windows = make_blocks()
    short = [compute(blocks, Sequence(str(i), range(8 * i, 8 * i + 8)), chunk=8) for i in range(4)]
    assert (windows.usage, blocks.usage) == (8 / 16, 8 / 16)
    for seq in short:
        blocks.free(seq)
    compute(blocks, Sequence("long", range(120)), chunk=8)
    assert blocks.usage == 30 / 32 > windows.usage


def test_a_hit_needs_the_window_in_both_groups() -> None:
    blocks, windows = make_blocks()
    blocks.free(compute(blocks, Sequence("a", range(40)), chunk=8))
    again = Sequence("b", [*range(40), 99])
    found = blocks.find_cached(again)
    assert len(found) == 10
    blocks.adopt(again, found)
    assert windows.num_used_blocks == 2 and again.window_start == 8, "eight tokens behind the next one"
    blocks.free(again)
    # Others take block after block: a hit only ends where the window before it is complete.
    others, lengths = [], set[int]()
    while windows.num_free_blocks:
        others.append(windows.take())
        found = blocks.find_cached(Sequence("c", [*range(40), 99]))
        keys = Sequence("c", range(40)).keys_of_full_blocks(len(found), BLOCK)
        contents = [
            (key, Sequence("c", range(40)).token_ids[i * 4 : i * 4 + 4].tobytes()) for i, key in enumerate(keys)
        ]
        assert len(windows.window_behind(contents)) == min(len(found), 2)
        lengths.add(len(found))
    assert max(lengths) == 10 and min(lengths) == 0


def test_fork_from_a_parent_whose_window_has_moved_on() -> None:
    blocks, _ = make_blocks()
    parent = compute(blocks, Sequence("a", range(40)), chunk=8)
    near, far = Sequence("a", range(39), index=1), Sequence("a", range(14), index=2)
    assert blocks.fork(parent, near) is not None
    assert near.window_table[near.window_start : 9] == parent.window_table[near.window_start : 9]
    assert blocks.fork(parent, far) is None and not far.block_table and not far.window_table


def test_a_prompt_goes_round_a_ring_and_ends_in_its_extent() -> None:
    blocks, windows = make_blocks()
    prompt = Sequence("p", range(60), is_system_prompt=True)
    size = windows.layout.tail_blocks(60)
    extent = Extent(16 - size, size)
    windows.vacate([extent], [])
    assert windows.begin_prompt(prompt, [extent])
    assert prompt.window_table[-size:] == list(range(extent.start, extent.end))
    assert len(set(prompt.window_table)) < len(prompt.window_table) == 15
    windows.check_integrity([prompt], set(range(extent.start, extent.end)))
    windows.end_prompt(prompt)
    assert windows.num_used_blocks == 0 and blocks.num_used_blocks == 0
