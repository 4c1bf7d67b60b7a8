"""The draw on a GPU: what `sampling.draw` says, for all rows of a batch, by launches that depend on no request.

Every launch has a program for each chunk of each row. The program of a row that comes to its end last finishes the row:
it combines what the others left. So rows that are greedy or have no cut are drawn by one launch, `draw`, which reads
their logits once:

    adjust     scores of rows with flags or a mask (steps 1 to 4).
    draw       the highest score; of random rows the sum of the weights. Draws, or sets up the search for the cut.
    narrow     sums up what 16 scores, evenly spaced in the bracket of the cut, would keep: a bracket 17 times narrower.
    gather     copies the scores in the bracket out; the last program finds the cut among them, exactly.
    choose     sums up the kept weights of each chunk, and draws.

Rows with cuts go through narrow, narrow, gather for top_k, the same for top_p over what it left, and choose. Programs
of rows that have nothing to do there end at once, after a microsecond or two a launch. Two rounds leave 1/289 of a
bracket of about 15 (see `_floor_of_nucleus`), in which there are some thousand tokens of a flat distribution and few of
a peaked one; any number is right, only slower. The search among them is one for an integer, the bits of a float32, four
ways at a time: 16 rounds at most.

Cost per token and launch: draw and choose 2 to 4 bytes read and an exponential; narrow the same and 16 × 3 operations,
which is what bounds it on an H100 (about 55 µs for 256 rows of 128,256; the bytes take 25). Rows with a mask or flags
write and read their scores as float32 besides.

A weight is exp((x - highest) / temperature) in units of 2^-44, an integer: where weights are summed up in no fixed
order, the order does not matter, and a row draws the same whatever its neighbours are. Less than one unit is never
drawn. Comparisons are of the scores before their division by the temperature, which keeps their order.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops import sampling
from vllm.ops.launch import follow, launch
from vllm.ops.sampling import LATER, NO_MASK, Flag, FloatColumn, IntColumn, SamplingTables
from vllm.sampling_params import MAX_BAD_SEQUENCES

CHUNK = 4096
"""Tokens of a program."""

PIVOTS, ROUNDS = 16, 2
"""Scores tried in a round of the search, and rounds before its candidates are copied out."""

# Scores that the search looks at in one go.
_TILE = tl.constexpr(2048)

_LOG2E = tl.constexpr(1.4426950408889634)
_UNIT = tl.constexpr(2.0**44)
_BANNED = tl.constexpr(sampling.BANNED)
_NOT_ALLOWED = tl.constexpr(sampling.NOT_ALLOWED)
# What no parameter forbids lies above; a bracket that reaches from BANNED upwards would be of no use.
_FORBIDDEN = tl.constexpr(-1e29)
_LATER = tl.constexpr(LATER)

_TEMPERATURE = tl.constexpr(int(FloatColumn.TEMPERATURE))
_TOP_P = tl.constexpr(int(FloatColumn.TOP_P))
_MIN_P = tl.constexpr(int(FloatColumn.MIN_P))
_PRESENCE = tl.constexpr(int(FloatColumn.PRESENCE))
_FREQUENCY = tl.constexpr(int(FloatColumn.FREQUENCY))
_REPETITION = tl.constexpr(int(FloatColumn.REPETITION))
_FLOATS = tl.constexpr(len(FloatColumn))
_SEED = tl.constexpr(int(IntColumn.SEED))
_NUM_PROMPT_TOKENS = tl.constexpr(int(IntColumn.NUM_PROMPT_TOKENS))
_TOP_K = tl.constexpr(int(IntColumn.TOP_K))
_MIN_TOKENS = tl.constexpr(int(IntColumn.MIN_TOKENS))
_NUM_BIAS = tl.constexpr(int(IntColumn.NUM_BIAS))
_NUM_STOPS = tl.constexpr(int(IntColumn.NUM_STOPS))
_NUM_BAD_SEQUENCES = tl.constexpr(int(IntColumn.NUM_BAD_SEQUENCES))
_FLAGS = tl.constexpr(int(IntColumn.FLAGS))
_INTS = tl.constexpr(len(IntColumn))

_PENALTIES = tl.constexpr(int(Flag.PENALTIES))
_ALLOWED = tl.constexpr(int(Flag.ALLOWED))
_BIAS = tl.constexpr(int(Flag.BIAS))
_STOPS = tl.constexpr(int(Flag.STOPS))
_BAD_WORDS = tl.constexpr(int(Flag.BAD_WORDS))
_SPARSE = tl.constexpr(int(Flag.BIAS | Flag.STOPS | Flag.BAD_WORDS))

_MAX_BIAS = tl.constexpr(sampling.MAX_BIAS)
_MAX_STOPS = tl.constexpr(sampling.MAX_STOPS)
_MAX_BAD_TOKENS = tl.constexpr(sampling.MAX_BAD_TOKENS)
_MAX_BAD_SEQUENCES = tl.constexpr(MAX_BAD_SEQUENCES)
_STOPS_BLOCK = tl.constexpr(triton.next_power_of_2(sampling.MAX_STOPS))
_BAD_SEQUENCES_BITS = tl.constexpr(MAX_BAD_SEQUENCES.bit_length())
_FIRST_PROBE = tl.constexpr(1 << (MAX_BAD_SEQUENCES.bit_length() - 1))

# What a row in progress is at: columns of a float64 table, which holds any float32.
_STAGE = tl.constexpr(0)
_HIGHEST = tl.constexpr(1)
_SCALE = tl.constexpr(2)  # log2(e) / temperature
_UNIFORM = tl.constexpr(3)
_ADJUSTED = tl.constexpr(4)  # whether its scores are in the workspace; otherwise they are the logits
_CUT = tl.constexpr(5)  # highest so far
_LOW = tl.constexpr(6)  # bracket: what is at least LOW reaches TARGET, what is at least HIGH does not
_HIGH = tl.constexpr(7)
_TARGET = tl.constexpr(8)  # tokens, or weight in units
_NUCLEUS = tl.constexpr(9)  # top_p
_FLOOR = tl.constexpr(10)  # no nucleus ends below
_STATE = tl.constexpr(16)

_DONE = tl.constexpr(0)
_SEEKS_TOP_K = tl.constexpr(1)
_SEEKS_TOP_P = tl.constexpr(2)
_CHOOSES = tl.constexpr(3)


@triton.jit
def _key(x):
    """int32 that are in the order of scores; 0.0 and -0.0 are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _of_key(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _weights(x, highest, scale):
    """Units of 2^-44 as int64; `highest` may be -inf if all are."""
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return (tl.exp2((x - base) * scale) * _UNIT).to(tl.int64)


@triton.jit
def _scores(logits_ptr, scores_ptr, adjusted, i, offsets, V: tl.constexpr):
    """float32; -inf beyond the vocabulary."""
    inside = offsets < V
    if adjusted:
        x = tl.load(scores_ptr + i * V + offsets, mask=inside, other=float("-inf"))
    else:
        x = tl.load(logits_ptr + i * V + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    return x


@triton.jit
def _is_last(arrived_ptr, i, CHUNKS: tl.constexpr):
    """Whether every other program of the row has been here; it then sees all that they wrote before. Leaves the counter
    as it was."""
    # Release and acquire are the first thread's; the barrier puts the others' stores before them.
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr + i, 1, sem="acq_rel", scope="gpu") == CHUNKS - 1
    if last:
        tl.store(arrived_ptr + i, 0)
    tl.debug_barrier()
    return last


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, counter):
    """`sampling.uniform`, as float64."""
    x = _mixed(seed.to(tl.uint64) + 0x9E3779B97F4A7C15)
    x = _mixed(x + (counter + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    return (x >> 11).to(tl.float64) * 2.0**-53


@triton.jit
def _ban(scores_ptr, tokens, where):
    x = tl.load(scores_ptr + tokens, mask=where, other=0.0)
    tl.store(scores_ptr + tokens, tl.minimum(x, _BANNED), mask=where)


@triton.jit
def _completed(bad_tokens_ptr, bad_ends_ptr, row, own_tokens_ptr, num_tokens, num_outputs, num_sequences):
    """Of each place in the list of a row's bad words: its token, and whether it would complete its word now.

    All places at once: each looks up the word that it is in by binary search over the ends, and compares its token with
    the output. A word's last token completes it if there is no difference between its start and its end.
    """
    place = tl.arange(0, _MAX_BAD_TOKENS)
    ends = bad_ends_ptr + row * _MAX_BAD_SEQUENCES
    word = tl.zeros([_MAX_BAD_TOKENS], tl.int32)
    for bit in tl.static_range(_BAD_SEQUENCES_BITS):
        probe = word + (_FIRST_PROBE >> bit)
        end = tl.load(ends + probe - 1, mask=probe <= num_sequences, other=_MAX_BAD_TOKENS)
        word = tl.where(end <= place, probe, word)
    real = word < num_sequences
    start = tl.load(ends + word - 1, mask=real & (word > 0), other=0)
    last = tl.load(ends + word, mask=real, other=0) - 1
    token = tl.load(bad_tokens_ptr + row * _MAX_BAD_TOKENS + place, mask=real, other=0)
    back = last - place
    compared = real & (back > 0)
    before = tl.load(own_tokens_ptr + num_tokens - back, mask=compared & (back <= num_outputs), other=-1)
    wrong = (compared & (before != token)).to(tl.int32)
    errors = tl.cumsum(wrong, 0)
    completes = real & (back == 0) & (errors == tl.gather(errors - wrong, start, 0))
    return token, completes


@triton.jit(do_not_specialize=["shift"], do_not_specialize_on_alignment=["rows_ptr", "num_tokens_ptr", "mask_rows_ptr"])
def _adjust_kernel(
    logits_ptr,
    rows_ptr,
    num_tokens_ptr,
    shift,
    token_ids_ptr,
    token_stride,
    masks_ptr,
    mask_stride,
    mask_rows_ptr,
    floats_ptr,
    ints_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    stop_ids_ptr,
    bad_tokens_ptr,
    bad_ends_ptr,
    allowed_ptr,
    counts_ptr,
    scores_ptr,
    V: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Steps 1 to 4; what is given by token ids is written into the workspace beside the rest of the chunk."""
    follow(PDL)
    i = tl.program_id(1).to(tl.int64)
    mask_row = tl.load(mask_rows_ptr + i)
    own = tl.load(rows_ptr + i)
    row = tl.minimum(own, TABLE_ROWS - 1)
    ints = ints_ptr + row * _INTS
    flags = tl.load(ints + _FLAGS)
    if (mask_row == _LATER) | ((mask_row < 0) & (flags == 0)):
        return
    num_tokens = tl.load(num_tokens_ptr + i) + shift
    num_outputs = num_tokens - tl.load(ints + _NUM_PROMPT_TOKENS)
    first = tl.program_id(0) * CHUNK
    end = tl.minimum(first + CHUNK, V)
    offsets = first + tl.arange(0, CHUNK)
    inside = offsets < V
    scores_ptr += i * V
    x = _scores(logits_ptr, logits_ptr, False, i, offsets, V)
    if (flags & _ALLOWED) != 0:
        words = tl.load(allowed_ptr + row * ((V + 31) // 32) + offsets // 32, mask=inside, other=0)
        x = tl.where(((words >> (offsets % 32)) & 1) != 0, x, tl.minimum(x, _NOT_ALLOWED))
    if (flags & _SPARSE) != 0:
        tl.store(scores_ptr + offsets, x, mask=inside)
        tl.debug_barrier()
        if (flags & _BIAS) != 0:
            j = tl.arange(0, _MAX_BIAS)
            used = j < tl.load(ints + _NUM_BIAS)
            tokens = tl.load(bias_ids_ptr + row * _MAX_BIAS + j, mask=used, other=-1)
            here = (tokens >= first) & (tokens < end)
            value = tl.load(bias_values_ptr + row * _MAX_BIAS + j, mask=here, other=0.0)
            value += tl.load(scores_ptr + tokens, mask=here, other=0.0)
            tl.store(scores_ptr + tokens, value, mask=here)
            tl.debug_barrier()
        if (flags & _STOPS) != 0:
            j = tl.arange(0, _STOPS_BLOCK)
            num_stops = tl.where(num_outputs < tl.load(ints + _MIN_TOKENS), tl.load(ints + _NUM_STOPS), 0)
            tokens = tl.load(stop_ids_ptr + row * _MAX_STOPS + j, mask=j < num_stops, other=-1)
            _ban(scores_ptr, tokens, (tokens >= first) & (tokens < end))
            tl.debug_barrier()
        if (flags & _BAD_WORDS) != 0:
            num_sequences = tl.load(ints + _NUM_BAD_SEQUENCES).to(tl.int32)
            own_tokens_ptr = token_ids_ptr + own * token_stride
            tokens, completes = _completed(
                bad_tokens_ptr, bad_ends_ptr, row, own_tokens_ptr, num_tokens, num_outputs, num_sequences
            )
            _ban(scores_ptr, tokens, completes & (tokens >= first) & (tokens < end))
            tl.debug_barrier()
        x = tl.load(scores_ptr + offsets, mask=inside, other=float("-inf"))
    if (flags & _PENALTIES) != 0:
        floats = floats_ptr + row * _FLOATS
        stored = tl.load(counts_ptr + row * V + offsets, mask=inside, other=0).to(tl.int32)
        count = stored & 0x7FFF
        repetition = tl.load(floats + _REPETITION)
        repeated = tl.where(x > 0, tl.math.div_rn(x, tl.zeros([CHUNK], tl.float32) + repetition), x * repetition)
        x = tl.where((count > 0) | (stored < 0), repeated, x)
        x -= count.to(tl.float32) * tl.load(floats + _FREQUENCY)
        x -= (count > 0).to(tl.float32) * tl.load(floats + _PRESENCE)
    if mask_row >= 0:
        words = tl.load(masks_ptr + mask_row * mask_stride + offsets // 32, mask=inside, other=0)
        x = tl.where(((words >> (offsets % 32)) & 1) != 0, x, float("-inf"))
    tl.store(scores_ptr + offsets, x, mask=inside)


@triton.jit
def _pick(
    logits_ptr,
    scores_ptr,
    adjusted,
    i,
    masses,
    highest,
    cut,
    scale,
    uniform,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
):
    """The token at which the running sum of the weights exceeds `uniform` times their sum: first its chunk, then its
    place in there.

    Args:
        masses: Kept weight of each chunk, in any unit that is the same for all; float64 [CHUNKS_BLOCK].
        highest: What the weights of each chunk may be computed from; [CHUNKS_BLOCK].
    """
    chunks = tl.arange(0, CHUNKS_BLOCK)
    ends = tl.cumsum(masses, 0)
    target = uniform * tl.sum(masses, 0)
    # Rounding may leave the target at the whole sum: then it is the last one that has any weight.
    last = tl.max(tl.where(masses > 0, chunks, 0), 0)
    chunk = tl.minimum(tl.min(tl.where((ends > target) & (masses > 0), chunks, CHUNKS_BLOCK), 0), last)
    chosen = chunks == chunk
    before = tl.sum(tl.where(chosen, ends - masses, 0.0), 0)
    share = (target - before) / tl.sum(tl.where(chosen, masses, 0.0), 0)
    top = tl.max(tl.where(chosen, highest, float("-inf")), 0)

    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _scores(logits_ptr, scores_ptr, adjusted, i, offsets, V)
    weights = _weights(tl.where(x >= cut, x, float("-inf")), top, scale)
    inner = (share * tl.sum(weights, 0).to(tl.float64)).to(tl.int64)
    place = tl.sum((tl.cumsum(weights, 0) <= inner).to(tl.int32), 0)
    last = tl.max(tl.where(weights > 0, offsets, chunk * CHUNK), 0)
    return tl.minimum(chunk * CHUNK + place, last)


@triton.jit
def _hand_out(token, i, own, row, num_tokens, flags, drawn_ptr, token_ids_ptr, stride, counts_ptr, V: tl.constexpr):
    tl.store(drawn_ptr + i, token.to(tl.int64))
    tl.store(token_ids_ptr + own * stride + num_tokens, token.to(tl.int64))
    if (flags & _PENALTIES) != 0:
        at = counts_ptr + row * V + token
        stored = tl.load(at).to(tl.int32)
        tl.store(at, tl.where((stored & 0x7FFF) < 0x7FFF, stored + 1, stored).to(tl.int16))


@triton.jit
def _floor_of_nucleus(highest, temperature, top_p, V: tl.constexpr):
    """A score below which no token is kept by top_p, whatever top_k left.

    All tokens below highest - temperature * log(V / (1 - top_p)) together weigh less than V * (1 - top_p) / V = 1 -
    top_p. The whole weighs at least 1, the weight of the highest, so what is not below weighs more than top_p of it.
    The margin is more than rounding takes.
    """
    distance = tl.log(V / (1.0 - top_p)) + 0.01
    return highest - temperature * distance


@triton.jit(
    do_not_specialize=["shift"],
    do_not_specialize_on_alignment=["rows_ptr", "num_tokens_ptr", "drawn_ptr", "mask_rows_ptr"],
)
def _draw_kernel(
    logits_ptr,
    rows_ptr,
    num_tokens_ptr,
    shift,
    token_ids_ptr,
    token_stride,
    drawn_ptr,
    mask_rows_ptr,
    floats_ptr,
    ints_ptr,
    counts_ptr,
    scores_ptr,
    state_ptr,
    arrived_ptr,
    highest_ptr,
    lowest_ptr,
    token_ptr,
    number_ptr,
    mass_ptr,
    V: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    chunk = tl.program_id(0)
    i = tl.program_id(1).to(tl.int64)
    state = state_ptr + i * _STATE
    mask_row = tl.load(mask_rows_ptr + i)
    if mask_row == _LATER:
        tl.store(state + _STAGE, _DONE)
        return
    own = tl.load(rows_ptr + i)
    row = tl.minimum(own, TABLE_ROWS - 1)
    num_tokens = tl.load(num_tokens_ptr + i) + shift
    ints = ints_ptr + row * _INTS
    floats = floats_ptr + row * _FLOATS
    flags = tl.load(ints + _FLAGS)
    num_outputs = num_tokens - tl.load(ints + _NUM_PROMPT_TOKENS)
    temperature = tl.load(floats + _TEMPERATURE)
    scale = _LOG2E / tl.where(temperature > 0, temperature, 1.0)
    adjusted = (flags != 0) | (mask_row >= 0)

    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _scores(logits_ptr, scores_ptr, adjusted, i, offsets, V)
    highest = tl.max(x, 0)
    at = i * CHUNKS + chunk
    tl.store(highest_ptr + at, highest)
    tl.store(token_ptr + at, tl.min(tl.where(x == highest, offsets, V - 1), 0))
    if temperature > 0:
        free = x > _FORBIDDEN
        tl.store(lowest_ptr + at, tl.min(tl.where(free, x, float("inf")), 0))
        tl.store(number_ptr + at, tl.sum(free.to(tl.int32), 0))
        tl.store(mass_ptr + at, tl.sum(_weights(x, highest, scale), 0))
    if not _is_last(arrived_ptr, i, CHUNKS):
        return

    chunks = tl.arange(0, CHUNKS_BLOCK)
    real = chunks < CHUNKS
    parts = i * CHUNKS + chunks
    tops = tl.load(highest_ptr + parts, mask=real, other=float("-inf"))
    highest = tl.max(tops, 0)
    token = tl.min(tl.where(tops == highest, tl.load(token_ptr + parts, mask=real, other=V - 1), V - 1), 0)
    stage = tl.full([], _DONE, tl.int32)
    if temperature > 0:
        top_k = tl.load(ints + _TOP_K)
        top_p = tl.load(floats + _TOP_P)
        min_p = tl.load(floats + _MIN_P)
        uniform = _uniform(tl.load(ints + _SEED), num_outputs)
        number = tl.sum(tl.load(number_ptr + parts, mask=real, other=0), 0)
        # Chunks without any weight have no highest score to be far from.
        far = tl.where(tops == float("-inf"), float("-inf"), tops - tl.where(highest == float("-inf"), 0.0, highest))
        factors = tl.exp(far.to(tl.float64) / temperature.to(tl.float64))
        masses = tl.load(mass_ptr + parts, mask=real, other=0).to(tl.float64) * factors
        # Where fewer are free, top_k would only choose among what has no weight.
        stage = tl.where(min_p > 0, _CHOOSES, _DONE)
        stage = tl.where(top_p < 1.0, _SEEKS_TOP_P, stage)
        stage = tl.where((top_k > 0) & (top_k < number), _SEEKS_TOP_K, stage)
        if stage == _DONE:
            token = _pick(
                logits_ptr,
                scores_ptr,
                adjusted,
                i,
                masses,
                tops,
                float("-inf"),
                scale,
                uniform,
                V,
                CHUNK,
                CHUNKS_BLOCK,
            )
        else:
            cut = float("-inf")
            if min_p > 0:
                least = highest.to(tl.float64) + temperature.to(tl.float64) * tl.log(min_p.to(tl.float64))
                cut = least.to(tl.float32)
                # The first score that is not below.
                cut = tl.where(cut.to(tl.float64) < least, _of_key(_key(cut) + 1), cut)
            lowest = tl.minimum(tl.min(tl.load(lowest_ptr + parts, mask=real, other=float("inf")), 0), highest)
            floor = lowest
            if top_p < 1.0:
                floor = tl.maximum(lowest, _floor_of_nucleus(highest, temperature, top_p, V))
            target = top_k.to(tl.float64)
            low = lowest
            if stage == _SEEKS_TOP_P:
                target = top_p.to(tl.float64) * tl.sum(masses, 0)
                low = floor
            tl.store(state + _HIGHEST, highest)
            tl.store(state + _SCALE, scale)
            tl.store(state + _UNIFORM, uniform)
            tl.store(state + _ADJUSTED, adjusted.to(tl.float64))
            tl.store(state + _CUT, cut)
            tl.store(state + _LOW, low)
            tl.store(state + _HIGH, _of_key(_key(highest) + 1))
            tl.store(state + _TARGET, target)
            tl.store(state + _NUCLEUS, top_p)
            tl.store(state + _FLOOR, floor)
    tl.store(state + _STAGE, stage)
    if stage == _DONE:
        _hand_out(token, i, own, row, num_tokens, flags, drawn_ptr, token_ids_ptr, token_stride, counts_ptr, V)


@triton.jit
def _narrow_kernel(
    logits_ptr,
    scores_ptr,
    state_ptr,
    arrived_ptr,
    sums_ptr,
    SEEKS: tl.constexpr,
    PIVOTS: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One round: of the pivots, the highest that keeps the target is the new LOW, the one above it the new HIGH."""
    follow(PDL)
    chunk = tl.program_id(0)
    i = tl.program_id(1).to(tl.int64)
    state = state_ptr + i * _STATE
    if tl.load(state + _STAGE) != SEEKS:
        return
    low = tl.load(state + _LOW).to(tl.float32)
    high = tl.load(state + _HIGH).to(tl.float32)
    step = (high - low) / (PIVOTS + 1)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _scores(logits_ptr, scores_ptr, tl.load(state + _ADJUSTED) != 0, i, offsets, V)
    weights = tl.full([CHUNK], 1.0, tl.float32)
    if SEEKS == _SEEKS_TOP_P:
        highest = tl.load(state + _HIGHEST).to(tl.float32)
        weights = tl.exp2((x - highest) * tl.load(state + _SCALE).to(tl.float32))
    sums_ptr += i * CHUNKS * PIVOTS
    for k in tl.static_range(PIVOTS):
        kept = tl.sum(tl.where(x >= low + step * (k + 1), weights, 0.0), 0)
        tl.store(sums_ptr + k * CHUNKS + chunk, kept)
    if not _is_last(arrived_ptr, i, CHUNKS):
        return
    target = tl.load(state + _TARGET)
    if SEEKS == _SEEKS_TOP_P:
        target /= _UNIT
    chunks = tl.arange(0, CHUNKS_BLOCK)
    new_low, new_high = low, high
    for k in tl.static_range(PIVOTS):
        parts = tl.load(sums_ptr + k * CHUNKS + chunks, mask=chunks < CHUNKS, other=0.0)
        reached = tl.sum(parts.to(tl.float64), 0) >= target
        pivot = low + step * (k + 1)
        new_low = tl.where(reached, tl.maximum(new_low, pivot), new_low)
        new_high = tl.where(reached, new_high, tl.minimum(new_high, pivot))
    tl.store(state + _LOW, new_low)
    tl.store(state + _HIGH, new_high)


@triton.jit
def _highest_key(candidates_ptr, found, key, end, missing, highest, scale, BY_WEIGHT: tl.constexpr):
    """The highest key from which on the candidates, their number or their weight, are not less than `missing`; at least
    `key`, from where on they are, and below `end`."""
    key = key.to(tl.int64)
    end = end.to(tl.int64)
    while end - key > 1:
        quarter = (end - key + 3) // 4
        first, second, third = key + quarter, key + 2 * quarter, key + 3 * quarter
        from_first, from_second, from_third = missing * 0, missing * 0, missing * 0
        for tile in range(0, found, _TILE):
            there = tile + tl.arange(0, _TILE)
            candidates = tl.load(candidates_ptr + there, mask=there < found, other=float("-inf"))
            weights = (there < found).to(tl.int64)
            if BY_WEIGHT:
                weights = _weights(candidates, highest, scale)
            keys = _key(candidates).to(tl.int64)
            from_first += tl.sum(tl.where(keys >= first, weights, 0), 0)
            from_second += tl.sum(tl.where(keys >= second, weights, 0), 0)
            from_third += tl.sum(tl.where(keys >= third, weights, 0), 0)
        key += quarter * (
            (from_first >= missing).to(tl.int64)
            + (from_second >= missing).to(tl.int64)
            + (from_third >= missing).to(tl.int64)
        )
        end = tl.minimum(end, key + quarter)
    return key.to(tl.int32)


@triton.jit
def _gather_kernel(
    logits_ptr,
    scores_ptr,
    state_ptr,
    arrived_ptr,
    candidates_ptr,
    found_ptr,
    number_ptr,
    mass_ptr,
    SEEKS: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Finds the cut in the bracket, and sets up what comes next: the search for top_p, or the draw.

    Where top_k keeps few, they are all copied out, so that the cut for top_p is found among them at once.
    """
    follow(PDL)
    chunk = tl.program_id(0)
    i = tl.program_id(1).to(tl.int64)
    state = state_ptr + i * _STATE
    if tl.load(state + _STAGE) != SEEKS:
        return
    low = tl.load(state + _LOW).to(tl.float32)
    high = tl.load(state + _HIGH).to(tl.float32)
    highest = tl.load(state + _HIGHEST).to(tl.float32)
    scale = tl.load(state + _SCALE).to(tl.float32)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _scores(logits_ptr, scores_ptr, tl.load(state + _ADJUSTED) != 0, i, offsets, V)
    at = i * CHUNKS + chunk
    target = tl.load(state + _TARGET)
    few = target < 0
    if SEEKS == _SEEKS_TOP_K:
        few = target <= _TILE
    end = tl.where(few, float("inf"), high)
    tl.store(number_ptr + at, tl.sum((x >= end).to(tl.int32), 0))
    tl.store(mass_ptr + at, tl.sum(_weights(tl.where(x >= end, x, float("-inf")), highest, scale), 0))
    inside = ((x >= low) & (x < end) & (x > float("-inf"))).to(tl.int32)
    candidates_ptr += i * V
    # In no fixed order, which the search among them does not depend on.
    start = tl.atomic_add(found_ptr + i, tl.sum(inside, 0), sem="relaxed", scope="gpu")
    tl.store(candidates_ptr + start + tl.cumsum(inside, 0) - 1, x, mask=inside != 0)
    if not _is_last(arrived_ptr, i, CHUNKS):
        return

    found = tl.load(found_ptr + i)
    # Every warp has read it before one of them clears it.
    tl.debug_barrier()
    tl.store(found_ptr + i, 0)
    chunks = tl.arange(0, CHUNKS_BLOCK)
    parts = i * CHUNKS + chunks
    above = tl.sum(tl.load(mass_ptr + parts, mask=chunks < CHUNKS, other=0), 0)
    if SEEKS == _SEEKS_TOP_K:
        number = tl.sum(tl.load(number_ptr + parts, mask=chunks < CHUNKS, other=0).to(tl.int64), 0)
        missing = target.to(tl.int64) - number
    else:
        missing = tl.ceil(target - above.to(tl.float64)).to(tl.int64)
    # At least one: rounding may have it that what is above the bracket is enough.
    missing = tl.maximum(missing, 1)

    key = _highest_key(candidates_ptr, found, _key(low), _key(high), missing, highest, scale, SEEKS == _SEEKS_TOP_P)
    cut = _of_key(key)
    stage = tl.full([], _CHOOSES, tl.int32)
    if SEEKS == _SEEKS_TOP_K:
        top_p = tl.load(state + _NUCLEUS)
        if top_p < 1.0:
            kept = above
            for tile in range(0, found, _TILE):
                there = tile + tl.arange(0, _TILE)
                candidates = tl.load(candidates_ptr + there, mask=there < found, other=float("-inf"))
                candidates = tl.where(candidates >= cut, candidates, float("-inf"))
                kept += tl.sum(_weights(candidates, highest, scale), 0)
            target = top_p * kept.to(tl.float64)
            if few:
                missing = tl.maximum(tl.ceil(target).to(tl.int64), 1)
                key = _highest_key(candidates_ptr, found, key, _key(highest) + 1, missing, highest, scale, True)
                cut = _of_key(key)
            else:
                stage = tl.full([], _SEEKS_TOP_P, tl.int32)
                tl.store(state + _TARGET, target)
                tl.store(state + _LOW, tl.maximum(tl.load(state + _FLOOR), cut.to(tl.float64)))
                tl.store(state + _HIGH, _of_key(_key(highest) + 1))
    tl.store(state + _CUT, tl.maximum(tl.load(state + _CUT), cut.to(tl.float64)))
    tl.store(state + _STAGE, stage)


@triton.jit(do_not_specialize=["shift"], do_not_specialize_on_alignment=["rows_ptr", "num_tokens_ptr", "drawn_ptr"])
def _choose_kernel(
    logits_ptr,
    rows_ptr,
    num_tokens_ptr,
    shift,
    token_ids_ptr,
    token_stride,
    drawn_ptr,
    ints_ptr,
    counts_ptr,
    scores_ptr,
    state_ptr,
    arrived_ptr,
    mass_ptr,
    V: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    chunk = tl.program_id(0)
    i = tl.program_id(1).to(tl.int64)
    state = state_ptr + i * _STATE
    if tl.load(state + _STAGE) != _CHOOSES:
        return
    cut = tl.load(state + _CUT).to(tl.float32)
    highest = tl.load(state + _HIGHEST).to(tl.float32)
    scale = tl.load(state + _SCALE).to(tl.float32)
    adjusted = tl.load(state + _ADJUSTED) != 0
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _scores(logits_ptr, scores_ptr, adjusted, i, offsets, V)
    mass = tl.sum(_weights(tl.where(x >= cut, x, float("-inf")), highest, scale), 0)
    tl.store(mass_ptr + i * CHUNKS + chunk, mass)
    if not _is_last(arrived_ptr, i, CHUNKS):
        return
    chunks = tl.arange(0, CHUNKS_BLOCK)
    masses = tl.load(mass_ptr + i * CHUNKS + chunks, mask=chunks < CHUNKS, other=0).to(tl.float64)
    tops = tl.zeros([CHUNKS_BLOCK], tl.float32) + highest
    uniform = tl.load(state + _UNIFORM)
    token = _pick(logits_ptr, scores_ptr, adjusted, i, masses, tops, cut, scale, uniform, V, CHUNK, CHUNKS_BLOCK)
    tl.store(state + _STAGE, _DONE)
    own = tl.load(rows_ptr + i)
    row = tl.minimum(own, TABLE_ROWS - 1)
    num_tokens = tl.load(num_tokens_ptr + i) + shift
    flags = tl.load(ints_ptr + row * _INTS + _FLAGS)
    _hand_out(token, i, own, row, num_tokens, flags, drawn_ptr, token_ids_ptr, token_stride, counts_ptr, V)


@triton.jit(do_not_specialize_on_alignment=["picked_ptr", "tokens_ptr"])
def _logprob_kernel(
    logits_ptr,
    picked_ptr,
    tokens_ptr,
    out_ptr,
    out_stride,
    lse_ptr,
    arrived_ptr,
    highest_ptr,
    number_ptr,
    mass_ptr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of each picked row: its token, the token's log-probability and rank; and the log of the sum of exponentials."""
    follow(PDL)
    chunk = tl.program_id(0)
    i = tl.program_id(1).to(tl.int64)
    of = tl.load(picked_ptr + i)
    token = tl.load(tokens_ptr + of)
    value = tl.load(logits_ptr + of * V + token).to(tl.float32)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _scores(logits_ptr, logits_ptr, False, of, offsets, V)
    at = i * CHUNKS + chunk
    highest = tl.max(x, 0)
    tl.store(highest_ptr + at, highest)
    tl.store(number_ptr + at, tl.sum((x > value).to(tl.int32), 0))
    tl.store(mass_ptr + at, tl.sum(_weights(x, highest, _LOG2E), 0))
    if not _is_last(arrived_ptr, i, CHUNKS):
        return
    chunks = tl.arange(0, CHUNKS_BLOCK)
    real = chunks < CHUNKS
    parts = i * CHUNKS + chunks
    tops = tl.load(highest_ptr + parts, mask=real, other=float("-inf")).to(tl.float64)
    highest = tl.max(tops, 0)
    masses = tl.load(mass_ptr + parts, mask=real, other=0).to(tl.float64) * tl.exp(tops - highest)
    lse = highest.to(tl.float64) + tl.log(tl.sum(masses, 0) / _UNIT)
    out = out_ptr + i * out_stride
    tl.store(out, token.to(tl.float64))
    tl.store(out + 1, value.to(tl.float64) - lse)
    tl.store(out + 2, (tl.sum(tl.load(number_ptr + parts, mask=real, other=0), 0) + 1).to(tl.float64))
    tl.store(lse_ptr + i, lse)


class DrawKernels:
    """The launches, and their memory on the device, taken once.

    Args:
        tables: What rows ask for. The last row is that of padding: greedy, and meant by every row number beyond.
        max_rows: Most rows of logits in a call.
        chunk, pivots, rounds: See the constants.

    Beside tokens and counts nothing is left behind by a call but the memory's contents, so calls follow each other on
    one stream.
    """

    def __init__(
        self, tables: SamplingTables, max_rows: int, chunk: int = CHUNK, pivots: int = PIVOTS, rounds: int = ROUNDS
    ) -> None:
        self._tables = tables
        self._table_rows, self._vocab_size = tables.counts.shape
        self._pivots, self._rounds = pivots, rounds
        self._chunks = triton.cdiv(self._vocab_size, chunk)
        device = tables.counts.device

        def memory(*columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((max_rows, *columns), dtype=dtype, device=device)

        self._scores = memory(self._vocab_size, dtype=torch.float32)
        self._candidates = memory(self._vocab_size, dtype=torch.float32)
        self._state = memory(_STATE.value, dtype=torch.float64).zero_()
        self._arrived = memory(dtype=torch.int32).zero_()
        self._found = memory(dtype=torch.int32).zero_()
        self._highest = memory(self._chunks, dtype=torch.float32)
        self._lowest = memory(self._chunks, dtype=torch.float32)
        self._token = memory(self._chunks, dtype=torch.int32)
        self._number = memory(self._chunks, dtype=torch.int32)
        self._mass = memory(self._chunks, dtype=torch.int64)
        self._sums = memory(pivots, self._chunks, dtype=torch.float32)
        self._no_masks = memory(dtype=torch.int64).fill_(NO_MASK)
        self._sizes = {
            "V": self._vocab_size,
            "CHUNK": chunk,
            "CHUNKS": self._chunks,
            "CHUNKS_BLOCK": triton.next_power_of_2(self._chunks),
            "num_warps": max(1, min(8, chunk // 512)),
            # What comes after the chunk's sums would take more, and leave room for half as many programs.
            "maxnreg": 64,
        }

    def draw(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        num_tokens: torch.Tensor,
        token_ids: torch.Tensor,
        drawn: torch.Tensor,
        masks: torch.Tensor | None = None,
        mask_rows: torch.Tensor | None = None,
        shift: int = 0,
        adjust: bool = True,
    ) -> None:
        """Draws for every row but those with top_k, top_p or min_p, which `restrict` is left to.

        Arguments as of `sampling.draw`, all on the device; tokens are written into `token_ids` as well.

        Args:
            drawn: Takes the tokens; int64 [N].
            mask_rows: May be `LATER` for rows that another call draws.
            shift: Is added to `num_tokens`.
            adjust: Some rows may have flags or a mask.
        """
        self._check(logits, token_ids)
        tables, grid = self._tables, (self._chunks, len(logits))
        batch = (logits, rows, num_tokens, shift, token_ids, token_ids.stride(0))
        mask_rows = self._no_masks if mask_rows is None else mask_rows
        if adjust:
            masks = tables.allowed if masks is None else masks
            launch(
                _adjust_kernel,
                grid,
                *batch,
                masks,
                masks.stride(0),
                mask_rows,
                *tables,
                self._scores,
                V=self._vocab_size,
                TABLE_ROWS=self._table_rows,
                CHUNK=self._sizes["CHUNK"],
                num_warps=self._sizes["num_warps"],
            )
        launch(
            _draw_kernel,
            grid,
            *batch,
            drawn,
            mask_rows,
            tables.floats,
            tables.ints,
            tables.counts,
            self._scores,
            self._state,
            self._arrived,
            self._highest,
            self._lowest,
            self._token,
            self._number,
            self._mass,
            TABLE_ROWS=self._table_rows,
            **self._sizes,
        )

    def restrict(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        num_tokens: torch.Tensor,
        token_ids: torch.Tensor,
        drawn: torch.Tensor,
        shift: int = 0,
    ) -> None:
        """Draws for the rows with top_k, top_p or min_p; after `draw`, with the same arguments."""
        grid = (self._chunks, len(logits))
        common = (logits, self._scores, self._state, self._arrived)
        # Sums end with an exchange between a program's warps: fewer of them, of more registers.
        narrow = {**self._sizes, "num_warps": max(1, self._sizes["num_warps"] // 2), "maxnreg": 128}
        for seeks in (_SEEKS_TOP_K.value, _SEEKS_TOP_P.value):
            for _ in range(self._rounds):
                launch(_narrow_kernel, grid, *common, self._sums, SEEKS=seeks, PIVOTS=self._pivots, **narrow)
            memory = (self._candidates, self._found, self._number, self._mass)
            launch(_gather_kernel, grid, *common, *memory, SEEKS=seeks, **self._sizes)
        launch(
            _choose_kernel,
            grid,
            logits,
            rows,
            num_tokens,
            shift,
            token_ids,
            token_ids.stride(0),
            drawn,
            self._tables.ints,
            self._tables.counts,
            self._scores,
            self._state,
            self._arrived,
            self._mass,
            TABLE_ROWS=self._table_rows,
            **self._sizes,
        )

    def logprobs(self, logits: torch.Tensor, picked: torch.Tensor, tokens: torch.Tensor, top: int) -> torch.Tensor:
        """Log-probabilities under softmax(logits), for the rows `picked` of them.

        Args:
            logits: [N, vocab_size].
            picked: int64 [P], at most `max_rows`.
            tokens: A token of each row of the logits; int64 [N].
            top: How many most likely tokens.

        Returns float64 [P, 3 + 2 top]: the token, its log-probability, its rank from 1 on, the most likely tokens and
        their log-probabilities, falling.
        """
        self._check(logits, tokens)
        count = len(picked)
        out = torch.empty((count, 3 + 2 * top), dtype=torch.float64, device=logits.device)
        lse = torch.empty(count, dtype=torch.float64, device=logits.device)
        launch(
            _logprob_kernel,
            (self._chunks, count),
            logits,
            picked,
            tokens,
            out,
            out.stride(0),
            lse,
            self._arrived,
            self._highest,
            self._number,
            self._mass,
            **self._sizes,
        )
        if top:
            values, columns = (logits if count == len(logits) else logits[picked]).topk(top, dim=-1)
            out[:, 3 : 3 + top] = columns
            out[:, 3 + top :] = values.double() - lse.unsqueeze(-1)
        return out

    def _check(self, logits: torch.Tensor, per_row: torch.Tensor) -> None:
        if len(logits) > len(self._state):
            raise ValueError(
                f"{len(logits)} rows of logits are more than the {len(self._state)} that there is room for"
            )
        if not logits.is_contiguous() or logits.shape[1] != self._vocab_size:
            raise ValueError(f"logits {tuple(logits.shape)} are not contiguous rows of {self._vocab_size} tokens")
        if per_row.stride(-1) != 1:
            raise ValueError("token ids must be contiguous in each row")
