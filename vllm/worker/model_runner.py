"""Carries out plans: builds a batch's inputs, runs the network, draws tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.layer import ForwardContext
from vllm.model_executor.layers.sampler import PROMPT_LOGPROB_ROWS, LogprobTensors, Sampler, TokenMasks
from vllm.model_executor.models.base import CausalLM
from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup
from vllm.ops.cpu.kernels import CompiledSteps, SequenceRows
from vllm.ops.sampling import NO_MASK
from vllm.ops.staging import to_device, write
from vllm.platforms.devices import is_gpu
from vllm.step import PROMPT_ROWS, PositionLogprobs, PrefixExtent, SequenceStart, StepPlan, StepResult, WindowExtent
from vllm.worker.cache_engine import CacheEngine
from vllm.worker.running_step import Draw

if TYPE_CHECKING:
    from vllm.worker.graph_runner import GraphRunner

# From so many tokens on, what a system prompt has in its extent already is read as an extent, not block by block: it
# lies in few pieces, and the kernels for extents are faster by a fifth and more.
_DENSE_FROM = 1024


class ModelRunner:
    """The running sequences of a rank, a row each, and the forward pass over them.

    Drawn tokens are written into `token_ids` on the device, where the next step reads them.

    Args:
        model: The network, weights loaded.
        cache: KV memory.
        backend: Attention.
        max_num_seqs: Rows of requests; those of system prompts follow them.
        max_model_len: Columns of `token_ids`.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: CacheEngine,
        backend: AttentionBackend,
        vocab_size: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.cache = cache
        self.backend = backend
        self.device = device
        self.sampler = Sampler(max_num_seqs, vocab_size, device)
        num_rows = max_num_seqs + PROMPT_ROWS
        # One row more than sequences, for the padding of captured steps.
        self.token_ids = torch.zeros((num_rows + 1, max_model_len + 1), dtype=torch.int64, device=device)
        self._prefix: list[tuple[PrefixExtent, ...]] = [()] * num_rows
        self._prefix_len = np.zeros(num_rows, np.int64)
        self._window_prefix: list[tuple[WindowExtent, ...]] = [()] * num_rows
        # Of rows that are prefills of system prompts: the pieces that their own tokens go into.
        self._own_extents: list[tuple[PrefixExtent, ...]] = [()] * num_rows
        self._num_prompt_logprobs = np.zeros(num_rows, np.int64)
        self.graphs: GraphRunner | None = None
        self._compiled: CompiledSteps | None = None
        if not is_gpu(device):
            window_tables = None if cache.window is None else cache.window.block_tables
            prefix_len = torch.from_numpy(self._prefix_len)
            rows = SequenceRows(self.token_ids, cache.block_tables, prefix_len, cache.block_size, window_tables)
            self._compiled = model.compiled_steps(rows, cache.k_caches, cache.v_caches)

    def capture_graphs(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        """Captures decode steps and small mixed steps, to be replayed from then on. Needs a GPU; does nothing for
        backends that cannot be captured."""
        self.graphs = self._make_graphs(max_num_seqs, max_num_batched_tokens)
        if self.graphs is not None:
            self.graphs.capture()

    def _make_graphs(self, max_num_seqs: int, max_num_batched_tokens: int) -> GraphRunner | None:
        from vllm.attention.backends.triton import TritonAttentionBackend
        from vllm.worker.graph_runner import GraphRunner

        if not isinstance(self.backend, TritonAttentionBackend):
            return None
        return GraphRunner(
            self.model, self.cache, self.backend, self.token_ids, self.sampler, max_num_seqs, max_num_batched_tokens
        )

    @torch.inference_mode()
    def try_largest_step(self, num_seqs: int, num_tokens: int, capture: bool, num_logprobs: int = 0) -> None:
        """Takes the memory of a step of so many tokens and of a draw for so many sequences, and gives it back. Needs a
        GPU. Kernels are only compiled by it, all that are in use, side by side.

        Args:
            capture: Steps will be captured.
            num_logprobs: Most likely tokens that a request may ask for.
        """
        from vllm.ops.launch import compiling_ahead

        graphs = self._make_graphs(num_seqs, num_tokens) if capture else None
        with compiling_ahead(), self.model.only_layers(self.model.layer_kinds()):
            self._run_typical_batches(num_tokens)
            self._run_largest_draw(num_seqs, num_logprobs)
            if graphs is not None:
                graphs.run_all()
        self._run_largest_draw(num_seqs, num_logprobs)

    def _run_largest_draw(self, num_seqs: int, num_logprobs: int) -> None:
        shape = (max(num_seqs, PROMPT_LOGPROB_ROWS), self.model.hidden_size)
        hidden = torch.zeros(shape, dtype=self.model.dtype, device=self.device)
        self.sampler.take_memory(self.model.logits(hidden), self.token_ids, num_logprobs)

    @torch.inference_mode()
    def _run_typical_batches(self, num_tokens: int) -> None:
        """Launches what batches launch that are no replays; they compute nothing of use."""
        mixed, extent = [1, max(1, num_tokens - 20)], 4096
        short = [min(100, num_tokens)] * max(1, num_tokens // 100)
        for lens, groups, contiguous_from in (
            ([num_tokens], [], None),
            ([num_tokens], [], 0),
            (mixed, [], None),
            (mixed, [PrefixGroup(0, sum(mixed), 0, extent)], None),
            (short, [], None),
            (short, [PrefixGroup(0, sum(short), 0, extent)], None),
        ):
            tokens = torch.zeros(sum(lens), dtype=torch.int64, device=self.device)
            columns = -(-max(lens) // self.cache.block_size)
            tables = torch.zeros((len(lens), columns), dtype=torch.int64, device=self.device)
            metadata = AttentionMetadata(tokens, tables, lens, lens, groups, self.cache.block_size, contiguous_from)
            self._forward(tokens, tokens, metadata)

    @torch.inference_mode()
    def apply(self, plan: StepPlan) -> None:
        """Brings blocks and rows into the state that the batch of a plan speaks of; see `StepPlan` for the order."""
        self.cache.apply(plan)
        self._start(plan.started)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Draw:
        """Starts the forward pass of a plan that has been applied; returns what draws its tokens."""
        if not plan.rows:
            return lambda masks: lambda: StepResult([], [], [])
        if self._compiled is not None:
            return self._run_compiled(self._compiled, plan)
        if self.graphs is not None and max(plan.counts) == 1 and all(plan.samples):
            return self._replay(self.graphs, plan)
        return self._run_batch(plan)

    def _start(self, sequences: list[SequenceStart]) -> None:
        """Writes what is known of sequences into their rows, the tokens of all of them in one go.

        Those of a pinned prefix are left out; nobody reads them again."""
        if not sequences:
            return
        for seq in sequences:
            self._prefix[seq.row] = seq.prefix
            self._window_prefix[seq.row] = seq.window_prefix
            self._prefix_len[seq.row] = sum(e.num_tokens for e in seq.prefix)
            self._own_extents[seq.row] = self._pieces(seq.block_table) if seq.is_system_prompt else ()
            self._num_prompt_logprobs[seq.row] = seq.sampling_params.prompt_logprobs or 0
        self.sampler.start([seq for seq in sequences if not seq.is_system_prompt])
        known = [np.array(seq.token_ids[self._prefix_len[seq.row] - seq.num_skipped :], np.int64) for seq in sequences]
        ends = [seq.num_skipped + len(seq.token_ids) for seq in sequences]
        if len(known) == 1:
            write(self.token_ids[sequences[0].row, ends[0] - len(known[0]) : ends[0]], known[0])
            return
        rows = np.repeat([seq.row for seq in sequences], [len(tokens) for tokens in known])
        columns = np.concatenate([np.arange(e - len(tokens), e) for e, tokens in zip(ends, known, strict=True)])
        tokens = np.concatenate(known)
        where_row, where_column, values = self._to_device(np.stack((rows, columns, tokens)))
        self.token_ids[where_row, where_column] = values

    def _pieces(self, blocks: list[int]) -> tuple[PrefixExtent, ...]:
        """The runs of neighbouring blocks, as extents that are full."""
        ends = [i for i in range(1, len(blocks)) if blocks[i] != blocks[i - 1] + 1] + [len(blocks)]
        starts = [0, *ends[:-1]]
        return tuple(
            PrefixExtent(blocks[a], (b - a) * self.cache.block_size) for a, b in zip(starts, ends, strict=True)
        )

    def _run_compiled(self, compiled: CompiledSteps, plan: StepPlan) -> Draw:
        """A batch as one call into the compiled CPU kernels; as two where the draw waits for masks, or where the states
        of prompt tokens are wanted."""
        groups, window_groups = self._groups(plan.rows, plan.counts), self._window_groups(plan)
        starts, counts = np.array(plan.starts, np.int64), np.array(plan.counts, np.int64)
        picked = np.flatnonzero(plan.samples)
        rows, num_tokens = np.array(plan.rows, np.int64)[picked], (starts + counts)[picked]
        asked = self.sampler.rows
        logits = torch.empty(len(rows), asked.vocab_size) if (asked.num_logprobs[rows] >= 0).any() else None

        def finish(drawn: list[int], prompt_logprobs: dict[int, list[LogprobTensors]]) -> Callable[[], StepResult]:
            tokens = torch.tensor(drawn, dtype=torch.int64)
            logprobs = None if logits is None else self.sampler.logprobs(logits, rows, tokens)
            return self._results(plan, picked, tokens, logprobs, prompt_logprobs)

        all_states = any(plan.wants_prompt_logprobs)
        if not all_states and not plan.masked:
            drawn = compiled.draw(
                plan.rows,
                plan.starts,
                plan.counts,
                plan.samples,
                groups,
                asked.tables,
                logits_out=logits,
                window_groups=window_groups,
            )
            wait = finish(drawn, {})
            return lambda masks: wait
        samples = None if all_states else plan.samples
        hidden = compiled.hidden(plan.rows, plan.starts, plan.counts, samples, groups, window_groups)
        ends = counts.cumsum()

        @torch.inference_mode()
        def draw(token_masks: np.ndarray | None) -> Callable[[], StepResult]:
            states = hidden[torch.from_numpy(ends[picked] - 1)] if all_states else hidden
            masks = mask_rows = None
            if token_masks is not None:
                masks, mask_rows = torch.from_numpy(token_masks), torch.full((len(rows),), NO_MASK, dtype=torch.int64)
                mask_rows[torch.from_numpy(np.searchsorted(picked, plan.masked))] = torch.arange(len(plan.masked))
            where = torch.from_numpy(rows), torch.from_numpy(num_tokens)
            drawn = compiled.draw_after(states, *where, asked.tables, masks, mask_rows, logits)
            return finish(drawn, self._prompt_logprobs(plan, hidden, ends))

        return draw

    def _run_batch(self, plan: StepPlan) -> Draw:
        rows, starts, counts = (np.array(x, np.int64) for x in (plan.rows, plan.starts, plan.counts))
        ends = counts.cumsum()
        token_rows, token_positions = rows, starts
        if ends[-1] > len(rows):
            token_rows = np.repeat(rows, counts)
            token_positions = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
        token_own = token_positions - self._prefix_len[token_rows]
        context_lens = starts + counts - self._prefix_len[rows]
        graphs = self.graphs
        if graphs is not None and ends[-1] <= graphs.max_mixed_tokens:
            sequences = np.stack((ends - counts, counts, context_lens, rows), axis=1)
            groups, window_groups = self._groups(plan.rows, plan.counts), self._window_groups(plan)
            hidden = graphs.mixed(token_rows, token_positions, token_own, sequences, groups, window_groups)
            return self._draw_later(plan, hidden, rows, starts + counts, ends)
        row_index, positions, own = self._to_device(np.stack((token_rows, token_positions, token_own)))
        block_size = self.cache.block_size
        dense = np.array(
            [n if self._own_extents[r] else 0 for r, n in zip(plan.rows, context_lens - counts, strict=True)]
        )
        dense[dense < _DENSE_FROM] = 0
        metadata = AttentionMetadata(
            slot_mapping=self.cache.block_tables[row_index, own // block_size] * block_size + own % block_size,
            block_tables=self._block_tables(rows, dense // block_size, context_lens),
            query_lens=plan.counts,
            context_lens=(context_lens - dense).tolist(),
            groups=self._groups(plan.rows, plan.counts, dense.tolist()),
            block_size=block_size,
            contiguous_from=self._contiguous_from(plan, dense),
        )
        window = self._window_metadata(plan, rows, row_index, own, context_lens)
        wanted = None
        last = ends[plan.samples] - 1
        if len(last) < len(token_rows) and not any(plan.wants_prompt_logprobs):
            wanted = self._to_device(last)
        hidden = self._forward(self.token_ids[row_index, positions], positions, metadata, wanted, window)
        return self._draw_later(plan, hidden, rows, starts + counts, ends)

    def _window_metadata(
        self, plan: StepPlan, rows: np.ndarray, row_index: torch.Tensor, own: torch.Tensor, context_lens: np.ndarray
    ) -> AttentionMetadata | None:
        """What a batch reads and writes in the window group; None where there is none.

        Args:
            rows, context_lens: Row of each sequence, and its own tokens.
            row_index, own: Row of each token, and its place among the own tokens.
        """
        group, groups = self.cache.window, self._window_groups(plan)
        if group is None or groups is None:
            return None
        tables, block_size = group.block_tables, group.block_size
        columns = -(-int(context_lens.max()) // block_size)
        return AttentionMetadata(
            slot_mapping=tables[row_index, own // block_size] * block_size + own % block_size,
            block_tables=tables[self._to_device(rows), :columns],
            query_lens=plan.counts,
            context_lens=context_lens.tolist(),
            groups=groups,
            block_size=block_size,
        )

    def _window_groups(self, plan: StepPlan) -> list[PrefixGroup] | None:
        """What a batch reads of extents of the window group; None where there is none."""
        if self.cache.window is None:
            return None
        return self._joined_groups([self._window_prefix[row] for row in plan.rows], plan.counts)

    def _replay(self, graphs: GraphRunner, plan: StepPlan) -> Draw:
        """A step of decode alone, as a captured graph."""
        rows, starts = np.array(plan.rows, np.int64), np.array(plan.starts, np.int64)
        groups, window_groups = self._groups(plan.rows, plan.counts), self._window_groups(plan)
        own = starts - self._prefix_len[rows]
        logits, drawn = graphs.decode(rows, starts, own, groups, window_groups, plan.masked)

        @torch.inference_mode()
        def draw(token_masks: np.ndarray | None) -> Callable[[], StepResult]:
            everyone = np.arange(len(rows))
            masks = self._token_masks(plan, everyone, token_masks)
            if masks is not None:
                self.sampler.draw(logits, rows, starts + 1, self.token_ids, masks, drawn)
            return self._results(plan, everyone, drawn, self.sampler.logprobs(logits, rows, drawn), {})

        return draw

    def _block_tables(self, rows: np.ndarray, skipped: np.ndarray, context_lens: np.ndarray) -> torch.Tensor:
        """Block tables of some rows, without the first `skipped` blocks of each; int64 [R, most blocks of any]."""
        columns = -(-context_lens // self.cache.block_size) - skipped
        tables = self.cache.block_tables
        if not skipped.any():
            return tables[self._to_device(rows), : int(columns.max())]
        wanted = np.minimum(skipped[:, None] + np.arange(columns.max()), tables.shape[1] - 1)
        return tables[self._to_device(rows).unsqueeze(-1), self._to_device(wanted)]

    def _contiguous_from(self, plan: StepPlan, dense: np.ndarray) -> int | None:
        """See `AttentionMetadata`: a system prompt that is alone in the batch and continues no other one."""
        row = plan.rows[0]
        if len(plan.rows) > 1 or len(self._own_extents[row]) != 1 or self._prefix[row]:
            return None
        if dense[0] != plan.starts[0]:
            return None
        return self._own_extents[row][0].start_block * self.cache.block_size

    def _groups(self, rows: list[int], counts: list[int], dense: list[int] | None = None) -> list[PrefixGroup]:
        """Runs of neighbouring tokens that read the same extent; a chain of extents puts a token into several.

        Args:
            dense: Own tokens of each row that are read as extents too.
        """
        chains = []
        for i, row in enumerate(rows):
            extents = self._prefix[row]
            if dense is not None and dense[i]:
                extents = (*extents, *_head(self._own_extents[row], dense[i]))
            chains.append(_positioned(extents))
        return self._joined_groups(chains, counts)

    def _joined_groups(self, chains: Iterable[Iterable[WindowExtent]], counts: list[int]) -> list[PrefixGroup]:
        """The groups of sequences of so many tokens each, given what each of them reads."""
        groups: list[PrefixGroup] = []
        latest: dict[int, int] = {}  # By start block: the last group that reads the extent.
        token = 0
        for extents, count in zip(chains, counts, strict=True):
            for extent in extents:
                at = latest.get(extent.start_block)
                last = groups[at] if at is not None else None
                joins = last is not None and last.first_token + last.num_tokens == token
                # One that is still being computed is read to different lengths.
                if at is not None and last is not None and joins and last.length == extent.num_tokens:
                    groups[at] = replace(last, num_tokens=last.num_tokens + count)
                else:
                    latest[extent.start_block] = len(groups)
                    slot = extent.start_block * self.cache.block_size
                    groups.append(PrefixGroup(token, count, slot, extent.num_tokens, extent.position))
            token += count
        return groups

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        wanted: torch.Tensor | None = None,
        window: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        """Hidden states of the tokens `wanted`, or of all.

        Args:
            window: What the layers of the window group read and write, where there is one.
        """
        context = ForwardContext(
            backend=self.backend,
            prepared=self._prepare(metadata, window),
            positions=positions,
            slot_mapping=metadata.slot_mapping,
            k_caches=self.cache.k_caches,
            v_caches=self.cache.v_caches,
            wanted=wanted,
            window_slots=None if window is None else window.slot_mapping,
        )
        return self.model(token_ids, context)

    def _prepare(self, metadata: AttentionMetadata, window: AttentionMetadata | None) -> list[Any]:
        """The plan of each of the network's different specs, in order."""
        specs = self.model.attention_specs
        if window is None:
            return self.backend.prepare(metadata, specs)
        full = iter(self.backend.prepare(metadata, [spec for spec in specs if spec.window is None]))
        within = iter(self.backend.prepare(window, [spec for spec in specs if spec.window is not None]))
        return [next(full) if spec.window is None else next(within) for spec in specs]

    def _draw_later(
        self, plan: StepPlan, hidden: torch.Tensor, rows: np.ndarray, num_tokens: np.ndarray, ends: np.ndarray
    ) -> Draw:
        return torch.inference_mode()(lambda masks: self._sample(plan, hidden, rows, num_tokens, ends, masks))

    def _sample(
        self,
        plan: StepPlan,
        hidden: torch.Tensor,
        rows: np.ndarray,
        num_tokens: np.ndarray,
        ends: np.ndarray,
        token_masks: np.ndarray | None,
    ) -> Callable[[], StepResult]:
        """Draws, and returns a function that waits for what was drawn."""
        prompt_logprobs = self._prompt_logprobs(plan, hidden, ends)
        picked = np.flatnonzero(plan.samples)
        drawn = torch.empty(0, dtype=torch.int64, device=self.device)
        logprobs: LogprobTensors | None = None
        if len(picked):
            if len(picked) < len(hidden):
                hidden = hidden[self._to_device(ends[picked] - 1)]
            if len(picked) < len(rows):
                rows, num_tokens = rows[picked], num_tokens[picked]
            masks = self._token_masks(plan, picked, token_masks)
            if not is_gpu(self.device) and masks is None and self.sampler.takes_most_likely(rows):
                # Without the logits of a whole row in memory.
                drawn = self.model.most_likely(hidden)
                self.token_ids[torch.from_numpy(rows), torch.from_numpy(num_tokens)] = drawn
            else:
                logits = self.model.logits(hidden)
                drawn = self.sampler.draw(logits, rows, num_tokens, self.token_ids, masks)
                logprobs = self.sampler.logprobs(logits, rows, drawn)
        return self._results(plan, picked, drawn, logprobs, prompt_logprobs)

    def _token_masks(self, plan: StepPlan, picked: np.ndarray, token_masks: np.ndarray | None) -> TokenMasks | None:
        """The masks of a plan for the logits of its entries `picked`."""
        if token_masks is None:
            return None
        return TokenMasks(np.searchsorted(picked, plan.masked), token_masks)

    def _results(
        self,
        plan: StepPlan,
        picked: np.ndarray,
        drawn: torch.Tensor,
        logprobs: LogprobTensors | None,
        prompt_logprobs: dict[int, list[LogprobTensors]],
    ) -> Callable[[], StepResult]:
        """A function that waits for what was drawn for the entries `picked` of the batch."""
        prompts = [part for parts in prompt_logprobs.values() for part in parts]
        fetch = self._fetch([drawn, *(part.table for part in prompts), *([logprobs.table] if logprobs else [])])

        def wait() -> StepResult:
            drawn, *tables = fetch()
            size = len(plan.rows)
            tokens = [-1] * size
            for i, token in zip(picked.tolist(), drawn.tolist(), strict=True):
                tokens[i] = token
            by_pick = logprobs.by_row(tables.pop()) if logprobs is not None else {}
            by_entry = {int(picked[k]): entry for k, entry in by_pick.items()}
            each = iter(tables)
            joined = {i: _joined(parts, each) for i, parts in prompt_logprobs.items()}
            return StepResult(
                tokens,
                [by_entry.get(i) for i in range(size)] if by_entry else [],
                [joined.get(i) for i in range(size)] if joined else [],
            )

        return wait

    def _fetch(self, tensors: list[torch.Tensor]) -> Callable[[], list[np.ndarray]]:
        """Starts bringing tensors to the host; returns a function that waits for them."""
        if not is_gpu(self.device):
            return lambda: [tensor.numpy() for tensor in tensors]
        copies = []
        for tensor in tensors:
            copies.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))
            copies[-1].copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def fetch() -> list[np.ndarray]:
            done.synchronize()
            return [copy.numpy() for copy in copies]

        return fetch

    def _prompt_logprobs(
        self, plan: StepPlan, hidden: torch.Tensor, ends: np.ndarray
    ) -> dict[int, list[LogprobTensors]]:
        """Log-probabilities of the prompt tokens that follow the computed positions, by entry of the batch."""
        found: dict[int, list[LogprobTensors]] = {}
        for i, wanted in enumerate(plan.wants_prompt_logprobs):
            if not wanted:
                continue
            row, start = plan.rows[i], plan.starts[i]
            first = int(ends[i]) - plan.counts[i]
            # The last prompt position predicts the first output token, which is no prompt token.
            count = plan.counts[i] - int(plan.samples[i])
            found[i] = []
            for a in range(0, count, PROMPT_LOGPROB_ROWS):
                b = min(count, a + PROMPT_LOGPROB_ROWS)
                logits = self.model.logits(hidden[first + a : first + b])
                tokens = self.token_ids[row, start + a + 1 : start + b + 1]
                found[i].append(self.sampler.prompt_logprobs(logits, tokens, int(self._num_prompt_logprobs[row])))
        return found

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values, self.device)


def _head(extents: tuple[PrefixExtent, ...], num_tokens: int) -> list[PrefixExtent]:
    """The extents that hold the first tokens of these, the last one perhaps not to its end."""
    head = []
    for extent in extents:
        if num_tokens <= 0:
            break
        head.append(PrefixExtent(extent.start_block, min(num_tokens, extent.num_tokens)))
        num_tokens -= extent.num_tokens
    return head


def _positioned(extents: Iterable[PrefixExtent]) -> list[WindowExtent]:
    """A chain of extents that hold the first tokens of a sequence, with their positions."""
    chain, position = [], 0
    for extent in extents:
        chain.append(WindowExtent(extent.start_block, extent.num_tokens, position))
        position += extent.num_tokens
    return chain


def _joined(parts: list[LogprobTensors], tables: Iterator[np.ndarray]) -> PositionLogprobs:
    """The positions of several parts, whose tables come next."""
    return PositionLogprobs.joined([part.by_row(next(tables))[0] for part in parts])
