"""The registry of system prompts: which are known, which are being computed, which are pinned, and who reads them.

State of a prompt:

    pending ──room found──▶ computing ──last chunk done──▶ pinned ──removed, nobody holds it──▶ (gone)
       │                       ▲ damaged                     ▲ ▲│
       ├──room found, kept in a tier──▶ loading ──copied─────┘ ││ room needed, nobody holds it, copy on the host
       ▲─────────────────────────asked for──────────── host ◀──┘
       └───no contiguous room──▶ (refused: its waiters run on what is left of its chain)

The pool decides; the scheduler moves blocks and runs the prefill. `_enter` is the one place where a state changes.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm.config import SystemPromptConfig
from vllm.core.pinned_prompt import (
    MAX_CHAIN,
    Outcome,
    PinClass,
    PinnedPrompt,
    PromptState,
    SystemPromptRefusedError,
    prompt_id,
)
from vllm.core.prefix_tree import PrefixTree, common_prefix_len
from vllm.core.prompt_tiers import PromptTiers
from vllm.core.varying_prompts import VaryingPrompts
from vllm.inputs import CacheMark
from vllm.logger import init_logger
from vllm.outputs import RefusedPromptInfo, SystemPromptInfo, SystemPromptPoolInfo, VaryingSpanInfo
from vllm.sequence import Sequence
from vllm.system_prompt_store.manifest import SnapshotRecord
from vllm.token_ids import TokenIds, token_array
from vllm.worker.cache_engine import Extent, PinnedBlockPool

__all__ = ["Outcome", "PinClass", "PinnedPrompt", "PromptState", "SystemPromptPool", "SystemPromptRefusedError"]

logger = init_logger(__name__)

_EVERYBODY = b""
_MAX_REFUSED = 1024
# Raw prompts that begin with the same so many tokens are worth comparing; what is pinned of them is cut to a multiple
# of the step, so that users whose texts happen to begin alike do not move its end.
_MIN_SHARED_TOKENS = 1024
_SHARED_STEP = 64
_MAX_HEADS = 256
_MAX_HEAD_TOKENS = 2_000_000
_CLASS_OF_MARKERS = {"soft": PinClass.SOFT, "hard": PinClass.HARD}


@dataclass(frozen=True)
class Want:
    """A prefix of a request that is to be pinned: its first `num_tokens` tokens."""

    num_tokens: int
    pin: PinClass
    ttl: float | None
    source: str
    scope: bytes


class Decision(NamedTuple):
    """What would happen to a request.

    Attributes:
        known: Pinned or coming prefixes that it may read, shortest first; one token is left to compute.
        creates: Prefixes to pin for it, shortest first.
        refused: Prefixes that cannot be pinned, and why.
    """

    known: list[PinnedPrompt]
    creates: list[Want]
    refused: list[tuple[Want, Outcome]]

    @property
    def num_pinned_tokens(self) -> int:
        """Tokens that it would read from pinned extents."""
        ends = [p.num_tokens for p in self.known[-1:]] + [w.num_tokens for w in self.creates[-1:]]
        return max(ends, default=0)


class SystemPromptPool:
    """Routes requests to pinned prompts and decides what is pinned.

    Args:
        config: Mode, limits, ttl.
        blocks: The pinned part of the KV cache; its budget is the pool's.
        block_size: Tokens in a block.
        on_release: Called with an extent whose pin has ended, so that its blocks become schedulable again.
        clock: Seconds since the epoch; replaced in tests.
        bytes_per_block: Of K and V, over all layers and ranks; shown in listings.
        tiers: Where prompts are kept besides the device; by default nowhere.
    """

    def __init__(
        self,
        config: SystemPromptConfig,
        blocks: PinnedBlockPool,
        block_size: int,
        on_release: Callable[[Extent], None],
        clock: Callable[[], float] = time.time,
        bytes_per_block: int = 0,
        tiers: PromptTiers | None = None,
    ) -> None:
        self.config = config
        self.tiers = tiers or PromptTiers()
        self.blocks = blocks
        self.block_size = block_size
        self.bytes_per_block = bytes_per_block
        self._on_release = on_release
        self._clock = clock
        self._prompts: dict[str, PinnedPrompt] = {}
        self._trees: dict[bytes, PrefixTree[PinnedPrompt]] = {}
        self._pending: deque[PinnedPrompt] = deque()
        self._promised_blocks = 0
        self._expiries: list[tuple[float, str]] = []
        self._refused: OrderedDict[str, RefusedPromptInfo] = OrderedDict()
        self._varying = VaryingPrompts()
        self._heads: OrderedDict[tuple[bytes, int], TokenIds] = OrderedDict()
        self._head_tokens = 0
        self.computing: PinnedPrompt | None = None
        self.outcomes: Counter[str] = Counter()
        self.num_prefills = 0
        self.num_displaced = 0
        self.tokens_reused = 0
        self.num_readers = 0
        self.pinned_tokens = 0
        self.prefill_seconds: list[float] = []
        self.new_spans: list[VaryingSpanInfo] = []

    # Routing ---------------------------------------------------------------------------------------------------

    def route(self, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark] = ()) -> Outcome | None:
        """Attaches `seq` to a system prompt, or says why it runs unpinned.

        Args:
            seq: A new sequence that holds no blocks.
            num_system_tokens: Length of the system prompt at its head, or None when its caller knows of none.
            marks: Further ends of prefixes that the client marked.

        Returns the outcome; None when no system prompt is in play. Whether the sequence must wait for a prefill is
        `is_waiting(seq)`.
        """
        outcome = self._route(seq, num_system_tokens, marks)
        if outcome is not None and not seq.goes_on:
            self.outcomes[outcome.value] += 1
        return outcome

    def _route(self, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark]) -> Outcome | None:
        in_play = bool(num_system_tokens or marks)
        if self.config.mode == "off":
            return Outcome.DISABLED if in_play else None
        if seq.sampling_params.prompt_logprobs is not None:
            # Every position's logits are asked for, so every position is computed.
            return Outcome.PROMPT_LOGPROBS if in_play else None
        wants = self._wants(seq, num_system_tokens, marks) or self._shared_head(seq)
        decision = self.decide(seq, wants)
        for want, refusal in decision.refused:
            self._note_refusal(seq.token_ids[: want.num_tokens], want, refusal, seq)
        now = self._clock()
        lengths = {want.num_tokens: want for want in wants}
        for prompt in decision.known:
            if prompt.num_tokens in lengths:
                self._renew(prompt, lengths[prompt.num_tokens])
        leaf = decision.known[-1] if decision.known else None
        if leaf is not None and not seq.goes_on:
            leaf.hits += 1
            leaf.tokens_saved += leaf.num_tokens
            self.tokens_reused += leaf.num_tokens
        for want in decision.creates:
            leaf = self._register(seq.token_ids[: want.num_tokens], want)
            leaf.order = seq.order
            leaf.payer = seq
            seq.num_cache_write_tokens += leaf.num_own_tokens
        if leaf is None:
            return decision.refused[-1][1] if decision.refused else None
        self._attach(seq, leaf)
        leaf.touch(now)
        return Outcome.CREATED if decision.creates else Outcome.HIT

    def _wants(self, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark]) -> list[Want]:
        """Prefixes that a request asks to have pinned, shortest first.

        Everything up to the end of the system part is pinned like any system prompt; a mark there can only make it
        last longer. What is marked beyond it is the client's own and is read in its namespace alone.
        """
        wants: dict[int, Want] = {}
        system = num_system_tokens or 0
        private = seq.tenant if self.config.private else _EVERYBODY
        if system:
            wants[system] = Want(system, PinClass.AUTOMATIC, self.config.ttl, "auto", private)
        marked = _CLASS_OF_MARKERS.get(self.config.markers, PinClass.SOFT)
        for mark in marks if self.config.markers != "off" else ():
            if mark.num_tokens <= system:
                pin, ttl = max(marked, PinClass.AUTOMATIC), _longer(self.config.ttl, mark.ttl)
                source = "auto" if mark.num_tokens == system else "marker"
                wants[mark.num_tokens] = Want(mark.num_tokens, pin, ttl, source, private)
            else:
                wants[mark.num_tokens] = Want(mark.num_tokens, marked, mark.ttl, "marker", seq.namespace)
        return [wants[n] for n in sorted(wants) if 0 < n < seq.num_prompt_tokens]

    def _scopes(self, seq: Sequence) -> list[bytes]:
        """Scopes whose prompts a request may read."""
        scopes = [_EVERYBODY]
        for scope in (seq.tenant, seq.namespace):
            if scope and scope not in scopes:
                scopes.append(scope)
        return scopes

    def decide(self, seq: Sequence, wants: list[Want]) -> Decision:
        """What would happen to a request that asks for `wants`; changes nothing."""
        path = self._path(seq.token_ids, self._scopes(seq))
        path = [p for p in path if p.num_tokens < seq.num_prompt_tokens]
        known = [p for p in path if not p.doomed]
        doomed = {p.num_tokens for p in path if p.doomed}
        longest = known[-1].num_tokens if known else 0
        chain = [(p.num_tokens, p.depth, p.scope) for p in known]
        creates: list[Want] = []
        refused: list[tuple[Want, Outcome]] = []
        num_blocks = 0
        for want in wants:
            n = want.num_tokens
            if n <= longest:
                continue
            start, depth = max(
                ((m, d) for m, d, scope in chain if m < n and d < MAX_CHAIN and self._may_extend(want.scope, scope)),
                default=(0, 0),
            )
            more = num_blocks + self._blocks_of(n - start)
            if n in doomed:
                refusal: Outcome | None = Outcome.BUSY
            elif self.config.mode == "declared" and want.pin != PinClass.HARD:
                refusal = Outcome.DISABLED
            else:
                refusal = self._refusal(n, more, want.pin)
            if refusal is not None:
                refused.append((want, refusal))
                continue
            num_blocks = more
            creates.append(want)
            chain.append((n, depth + 1, want.scope))
        return Decision(known, creates, refused)

    @staticmethod
    def _may_extend(scope: bytes, parent: bytes) -> bool:
        """Whether a prompt of `scope` may continue one of the scope `parent`, that can be read by whoever reads it."""
        return parent in (_EVERYBODY, scope)

    def _path(self, token_ids: TokenIds, scopes: Iterable[bytes]) -> list[PinnedPrompt]:
        """Prompts that `token_ids` start with, shortest first."""
        found: list[PinnedPrompt] = []
        for scope in scopes:
            tree = self._trees.get(scope)
            if tree is not None:
                found += tree.walk(token_ids).values
        found.sort(key=lambda p: p.num_tokens)
        return found

    def is_waiting(self, seq: Sequence) -> bool:
        """Whether `seq` waits for its system prompt's prefill, or for its way back to the device."""
        prompt = seq.system_prompt
        return prompt is not None and prompt.state != PromptState.PINNED

    def _attach(self, seq: Sequence, prompt: PinnedPrompt) -> None:
        self._recall(prompt)
        seq.system_prompt = prompt
        prompt.readers += 1
        self.num_readers += 1
        if self.is_waiting(seq):
            prompt.waiters.append(seq)

    def attach_sibling(self, seq: Sequence, sibling: Sequence) -> None:
        """Lets another output of one request read what the first one reads; its request was counted already."""
        if sibling.system_prompt is not None:
            self._attach(seq, sibling.system_prompt)

    def _shared_head(self, seq: Sequence) -> list[Want]:
        """The head that a long prompt without a system part has in common with an earlier one of its namespace.

        A prompt that merely continues an earlier one is the next turn of a conversation, which the cache of suffixes
        serves; it is a shared head only if both go on differently after it.
        """
        if self.config.mode != "auto" or seq.num_prompt_tokens <= _MIN_SHARED_TOKENS or seq.goes_on:
            return []
        key = (seq.namespace, hash(seq.token_ids[:_MIN_SHARED_TOKENS].tobytes()))
        earlier = self._heads.pop(key, token_array([]))
        self._heads[key] = seq.token_ids[:]
        self._head_tokens += seq.num_prompt_tokens - len(earlier)
        while len(self._heads) > _MAX_HEADS or self._head_tokens > _MAX_HEAD_TOKENS:
            self._head_tokens -= len(self._heads.popitem(last=False)[1])
        same = common_prefix_len(seq.token_ids, earlier)
        if same < _MIN_SHARED_TOKENS or same in (len(earlier), seq.num_prompt_tokens):
            return []
        size = same // _SHARED_STEP * _SHARED_STEP
        pinned = self._path(seq.token_ids, self._scopes(seq))
        if pinned and size - pinned[-1].num_tokens < _MIN_SHARED_TOKENS:
            return []
        return [Want(size, PinClass.AUTOMATIC, self.config.ttl, "shared_prefix", seq.namespace)]

    def _renew(self, prompt: PinnedPrompt, want: Want) -> None:
        """A request asks again for what is pinned already; it may only make the pin firmer and longer."""
        if prompt.source in ("declared", "preload"):
            return
        prompt.pin = max(prompt.pin, want.pin)
        ttl = _longer(prompt.ttl, want.ttl)
        if ttl != prompt.ttl:
            prompt.ttl = ttl
            self._track_ttl(prompt)
        self.tiers.note_change(prompt)

    def _note_refusal(self, token_ids: TokenIds, want: Want, outcome: Outcome, seq: Sequence) -> None:
        if seq.goes_on:
            return
        key = prompt_id(token_ids, want.scope)
        self._watch_variation(key, token_ids, want)
        info = self._refused.pop(key, None)
        if info is None or info.outcome != outcome.value:
            logger.info("System prompt %s runs unpinned: %s (request %s).", key, outcome.value, seq.request_id)
            info = RefusedPromptInfo(key, len(token_ids), outcome.value, 0, 0.0)
        info.requests += 1
        info.last_seen = self._clock()
        self._refused[key] = info
        if len(self._refused) > _MAX_REFUSED:
            self._refused.popitem(last=False)

    def _watch_variation(self, key: str, token_ids: TokenIds, want: Want) -> None:
        # What clients keep for themselves is nobody else's business, and no advice to the operator.
        if want.source == "auto" and want.scope == _EVERYBODY:
            span = self._varying.see(key, token_ids)
            if span is not None:
                self.new_spans.append(span)

    def explain(self, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark] = ()) -> dict[str, Any]:
        """What would happen to a request, and why; changes nothing.

        Returns `outcome`, `pinned_tokens` (tokens read from pinned extents), `id` of the prompt that it would read,
        `refused` (tokens and outcome of what cannot be pinned) and, where a pinned prompt is left early, `nearest`:
        its id, name and length, `position` of the first token that differs, and the two tokens there.
        """
        in_play = bool(num_system_tokens or marks)
        report: dict[str, Any] = {"outcome": None, "pinned_tokens": 0, "id": None, "refused": [], "nearest": None}
        if self.config.mode == "off":
            return report | {"outcome": Outcome.DISABLED.value if in_play else None}
        if seq.sampling_params.prompt_logprobs is not None:
            return report | {"outcome": Outcome.PROMPT_LOGPROBS.value if in_play else None}
        decision = self.decide(seq, self._wants(seq, num_system_tokens, marks))
        report["pinned_tokens"] = decision.num_pinned_tokens
        report["refused"] = [
            {"num_tokens": want.num_tokens, "outcome": refusal.value, "reason": self._explain(refusal, want.num_tokens)}
            for want, refusal in decision.refused
        ]
        if decision.creates:
            want = decision.creates[-1]
            report |= {"outcome": Outcome.CREATED.value, "id": prompt_id(seq.token_ids[: want.num_tokens], want.scope)}
        elif decision.known:
            report |= {"outcome": Outcome.HIT.value, "id": decision.known[-1].id}
        elif decision.refused:
            report["outcome"] = decision.refused[-1][1].value
        report["nearest"] = self._nearest(seq, decision.known[-1].num_tokens if decision.known else 0)
        return report

    def _nearest(self, seq: Sequence, at_least: int) -> dict[str, Any] | None:
        """The pinned prompt that a request follows furthest before it differs, if that is further than `at_least`."""
        best = None
        for scope in self._scopes(seq):
            tree = self._trees.get(scope)
            walk = tree.walk(seq.token_ids) if tree is not None else None
            if walk is not None and walk.nearest is not None and (best is None or walk.num_matched > best.num_matched):
                best = walk
        if best is None or best.nearest is None or best.num_matched <= at_least:
            return None
        prompt, position = best.nearest, best.num_matched
        ends = position >= seq.num_prompt_tokens
        return {
            "id": prompt.id,
            "name": prompt.name,
            "num_tokens": prompt.num_tokens,
            "position": position,
            "pinned_token": prompt.token_ids[position] if position < prompt.num_tokens else None,
            "request_token": None if ends else seq.token_ids[position],
        }

    # Registry --------------------------------------------------------------------------------------------------

    def add(
        self,
        token_ids: Iterable[int],
        name: str | None = None,
        ttl: float | None = None,
        pin: PinClass = PinClass.HARD,
        source: str = "declared",
    ) -> PinnedPrompt:
        """Declares a system prompt; the same tokens give the same prompt.

        Raises:
            SystemPromptRefusedError: it cannot be pinned.
        """
        token_ids = token_array(token_ids)
        existing = self._prompts.get(prompt_id(token_ids))
        if existing is not None:
            if existing.doomed:
                raise SystemPromptRefusedError(
                    Outcome.BUSY, f"System prompt {existing.id} is being removed; its last readers still run."
                )
            existing.source, existing.pin, existing.ttl = source, pin, ttl
            existing.name = name or existing.name
            self._track_ttl(existing)
            self.tiers.note_change(existing)
            self._recall(existing)
            if existing.state == PromptState.PINNED and not existing.is_being_saved:
                existing.is_being_saved = self.tiers.save(existing)
            return existing
        refusal = Outcome.DISABLED if self.config.mode == "off" else None
        if refusal is None:
            parent = self._parent(token_ids, _EVERYBODY)
            own = len(token_ids) - (parent.num_tokens if parent is not None else 0)
            refusal = self._refusal(len(token_ids), self._blocks_of(own), pin)
        if refusal is not None:
            raise SystemPromptRefusedError(refusal, self._explain(refusal, len(token_ids)))
        return self._register(token_ids, Want(len(token_ids), pin, ttl, source, _EVERYBODY), name)

    def restore(self, record: SnapshotRecord) -> bool:
        """Pins again, with the next steps, what a snapshot is of. Returns False where it may not be pinned now."""
        pin, scope = PinClass[record.pin.upper()], bytes.fromhex(record.scope)
        key = prompt_id(record.token_ids, scope)
        if key != record.prompt_id or key in self._prompts or self.config.mode == "off":
            return False
        if pin != PinClass.HARD and self.config.mode == "declared":
            return False
        token_ids = token_array(record.token_ids)
        parent = self._parent(token_ids, scope)
        start = parent.num_tokens if parent is not None else 0
        # Of an operator's prompt the tokens are enough: what the snapshot cannot give is computed.
        if start != record.start and pin != PinClass.HARD:
            return False
        refusal = self._refusal(len(token_ids), self._blocks_of(len(token_ids) - start), pin)
        if refusal is not None:
            logger.warning("System prompt %s is not brought back from its snapshot: %s.", key, refusal.value)
            return False
        want = Want(len(token_ids), pin, record.ttl, record.source, scope)
        self._register(token_ids, want, record.name)
        return True

    def update(self, key: str, **changes: Any) -> PinnedPrompt:
        """Changes the `name` or `ttl` of a prompt; its ttl counts from now on.

        Raises:
            KeyError: no such prompt.
        """
        prompt = self._prompts[key]
        if "name" in changes:
            prompt.name = changes["name"]
        if "ttl" in changes:
            prompt.ttl = changes["ttl"]
            prompt.touch(self._clock())
            self._track_ttl(prompt)
        self.tiers.note_change(prompt)
        return prompt

    def remove(self, key: str) -> PinnedPrompt:
        """Ends a pin: at once if nobody holds it, else when its last reader has finished and its last child is gone.

        Raises:
            KeyError: no such prompt.
        """
        prompt = self._prompts[key]
        prompt.doomed = True
        self._release_if_done(prompt)
        return prompt

    def set_budget(self, num_tokens: int) -> None:
        """Changes how many tokens may be pinned; what must stay schedulable stays so.

        Raises:
            ValueError: more than that is pinned or promised already.
        """
        num_blocks = num_tokens // self.block_size
        taken = self.blocks.pinned_blocks + self._promised_blocks
        if num_blocks < taken:
            raise ValueError(
                f"{taken * self.block_size} tokens are pinned already, more than {num_tokens}; remove prompts first."
            )
        self.blocks.set_budget(num_blocks)

    def detach(self, seq: Sequence) -> None:
        """Ends the reading of a finished sequence."""
        prompt = seq.system_prompt
        if prompt is None:
            return
        seq.system_prompt = None
        prompt.readers -= 1
        self.num_readers -= 1
        if seq in prompt.waiters:
            prompt.waiters.remove(seq)
        self._let_go(prompt)

    def _let_go(self, prompt: PinnedPrompt) -> None:
        """A reader or a child no longer holds `prompt`."""
        self._release_if_done(prompt)
        if prompt.next_expiry is None and not prompt.is_held and prompt.state != PromptState.REMOVED:
            self._track_ttl(prompt)

    def expire(self) -> None:
        """Ends pins whose ttl has run out."""
        if not self._expiries:
            return
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            when, key = heapq.heappop(self._expiries)
            prompt = self._prompts.get(key)
            if prompt is None or prompt.next_expiry != when:
                continue
            prompt.next_expiry = None
            # One that is held is looked at again when it is let go.
            if prompt.expires is None or prompt.is_held or prompt.doomed:
                continue
            if prompt.expires > now:
                self._track_ttl(prompt)
                continue
            logger.info("System prompt %s ends: not used for %g s.", key, prompt.ttl)
            self.remove(key)

    def get(self, key: str) -> PinnedPrompt | None:
        return self._prompts.get(key)

    def prompts(self) -> list[PinnedPrompt]:
        return list(self._prompts.values())

    def describe(self, prompt: PinnedPrompt) -> SystemPromptInfo:
        return prompt.info(self.bytes_per_block)

    def info(self) -> SystemPromptPoolInfo:
        return SystemPromptPoolInfo(
            mode=self.config.mode,
            budget_tokens=self.budget_tokens,
            pinned_tokens=self.pinned_tokens,
            prompts=self.num_prompts,
            readers=self.num_readers,
            tokens_reused=self.tokens_reused,
            prefills=self.num_prefills,
            displaced=self.num_displaced,
            outcomes=dict(self.outcomes),
            refused=list(self._refused.values()),
            varying=self._varying.spans,
        )

    @property
    def num_prompts(self) -> int:
        return len(self._prompts)

    @property
    def budget_tokens(self) -> int:
        return self.blocks.budget_blocks * self.block_size

    def _refusal(self, num_tokens: int, num_blocks: int, pin: PinClass) -> Outcome | None:
        """Why a prompt of `num_tokens` that needs `num_blocks` cannot be pinned; None if it can."""
        if num_tokens < self.config.min_tokens:
            return Outcome.TOO_SHORT
        needed = self._promised_blocks + num_blocks
        if self.blocks.fits(needed):
            return None
        missing = self.blocks.pinned_blocks + needed - self.blocks.budget_blocks
        going: set[PinnedPrompt] = set()
        # What takes another one's place on the device must be able to leave it again, or both would be stuck.
        if pin == PinClass.HARD or self.tiers.has_room(needed):
            going.update(self._demotable())
        if pin == PinClass.HARD:
            going.update(self._displaceable())
        return None if sum(p.num_blocks for p in going) >= missing else Outcome.OVER_BUDGET

    def _demotable(self) -> list[PinnedPrompt]:
        """Prompts that could leave the device at once without being lost, the oldest use first. Children may, but no
        parent: what its children hold must stay."""
        if not self.tiers.host.budget_blocks:
            return []
        on_host = [
            p
            for p in self._prompts.values()
            if p.state == PromptState.PINNED
            and p.pin != PinClass.HARD
            and not (p.is_held or p.doomed)
            and self.tiers.is_on_host(p)
        ]
        return sorted(on_host, key=lambda p: p.last_used)

    def _demote(self, prompt: PinnedPrompt) -> None:
        """Ends the extent of a prompt that the host tier holds."""
        logger.debug("System prompt %s leaves the device for the host.", prompt.id)
        self._enter(prompt, PromptState.HOST)
        self._give_back_extent(prompt)

    def _recall(self, prompt: PinnedPrompt) -> None:
        """A prompt that is on the host only is asked for: it waits for room on the device like a new one."""
        if prompt.state == PromptState.HOST:
            self._enter(prompt, PromptState.PENDING)

    def _displaceable(self) -> list[PinnedPrompt]:
        """Soft pins that could make room at once, in the order in which they would go: the oldest use first."""
        soft = [
            p
            for p in self._prompts.values()
            if p.pin == PinClass.SOFT and p.state == PromptState.PINNED and not p.is_being_saved
        ]
        going: list[PinnedPrompt] = []
        # A parent is used whenever a child is, so children of the same age are all that must be put before it.
        for p in sorted(soft, key=lambda p: (p.last_used, -p.num_tokens)):
            if not p.readers and p.children <= set(going):
                going.append(p)
        return going

    def _displace(self, prompt: PinnedPrompt) -> None:
        logger.info("System prompt %s gives way to a hard pin.", prompt.id)
        self.num_displaced += 1
        self.remove(prompt.id)

    def _explain(self, refusal: Outcome, num_tokens: int) -> str:
        if refusal == Outcome.TOO_SHORT:
            return (
                f"The system prompt has {num_tokens} tokens; --system-prompt-min-tokens asks for at least "
                f"{self.config.min_tokens}."
            )
        if refusal == Outcome.OVER_BUDGET:
            used = (self.blocks.pinned_blocks + self._promised_blocks) * self.block_size
            return (
                f"The system prompt has {num_tokens} tokens, but {used} of the pool's {self.budget_tokens} tokens are "
                "taken; remove a prompt or raise --system-prompt-cache-tokens."
            )
        if refusal == Outcome.BUSY:
            return "The system prompt is being removed; its last readers still run."
        if self.config.mode == "declared":
            return "Only prompts that an operator added are pinned (--system-prompt-cache declared)."
        return "The system-prompt pool is off (--system-prompt-cache off)."

    def _blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _parent(self, token_ids: TokenIds, scope: bytes) -> PinnedPrompt | None:
        """The longest prompt that one with these tokens may continue."""
        allowed = [_EVERYBODY] if scope == _EVERYBODY else [_EVERYBODY, scope]
        fitting = [
            p
            for p in self._path(token_ids, allowed)
            if p.num_tokens < len(token_ids) and p.depth < MAX_CHAIN and not p.doomed
        ]
        return fitting[-1] if fitting else None

    def _register(self, token_ids: TokenIds, want: Want, name: str | None = None) -> PinnedPrompt:
        parent = self._parent(token_ids, want.scope)
        if parent is not None:
            self._recall(parent)
        prompt = PinnedPrompt(
            token_ids,
            parent,
            self.block_size,
            name=name,
            source=want.source,
            pin=want.pin,
            ttl=want.ttl,
            scope=want.scope,
            now=self._clock(),
        )
        # Room that others take is only worth having for what replaces them, so they go no sooner than now.
        while not self.blocks.fits(self._promised_blocks + prompt.num_blocks) and (going := self._demotable()):
            self._demote(going[0])
        while not self.blocks.fits(self._promised_blocks + prompt.num_blocks) and (going := self._displaceable()):
            self._displace(going[0])
        self._watch_variation(prompt.id, token_ids, want)
        self._refused.pop(prompt.id, None)
        self._prompts[prompt.id] = prompt
        self._trees.setdefault(prompt.scope, PrefixTree()).insert(token_ids, prompt)
        self._enqueue(prompt)
        prompt.touch(prompt.created)
        self._track_ttl(prompt)
        logger.info("System prompt %s: %d tokens to be pinned (%s).", prompt.id, prompt.num_tokens, prompt.source)
        return prompt

    def _track_ttl(self, prompt: PinnedPrompt) -> None:
        """Looks at the prompt again when its ttl would have run out; uses only move that moment later."""
        prompt.next_expiry = prompt.expires
        if prompt.next_expiry is not None:
            heapq.heappush(self._expiries, (prompt.next_expiry, prompt.id))

    def _release_if_done(self, prompt: PinnedPrompt) -> None:
        settled = prompt.state not in (PromptState.COMPUTING, PromptState.LOADING, PromptState.REMOVED)
        if prompt.doomed and settled and not prompt.is_held:
            self._forget(prompt)

    def _forget(self, prompt: PinnedPrompt) -> None:
        """Ends a prompt that nobody holds, and gives its room back."""
        self._enter(prompt, PromptState.REMOVED)
        del self._prompts[prompt.id]
        tree = self._trees[prompt.scope]
        tree.remove(prompt.token_ids)
        if not tree:
            del self._trees[prompt.scope]
        if prompt.extent is not None:
            self._give_back_extent(prompt)
        self.tiers.forget(prompt)
        if prompt.parent is not None:
            prompt.parent.children.discard(prompt)
            self._let_go(prompt.parent)

    def _give_back_extent(self, prompt: PinnedPrompt) -> None:
        self._on_release(self.blocks.unpin(prompt.id))
        self.pinned_tokens -= prompt.num_own_tokens
        prompt.extent = None

    def _enter(self, prompt: PinnedPrompt, state: PromptState) -> None:
        if prompt.state == PromptState.PENDING:
            self._pending.remove(prompt)
            self._promised_blocks -= prompt.num_blocks
        if prompt is self.computing:
            self.computing = None
        prompt.state = state
        if state == PromptState.PENDING:
            self._enqueue(prompt)
        if state in (PromptState.COMPUTING, PromptState.LOADING):
            self.computing = prompt

    def _enqueue(self, prompt: PinnedPrompt) -> None:
        self._pending.append(prompt)
        self._promised_blocks += prompt.num_blocks

    # Prefill, driven by the scheduler ---------------------------------------------------------------------------

    @property
    def has_prefill(self) -> bool:
        return self.computing is not None or bool(self._pending)

    @property
    def next_pending(self) -> PinnedPrompt | None:
        return self._pending[0] if self._pending else None

    def find_window(self) -> int | None:
        """First block of the place for the first pending prompt; None when no contiguous room can be had."""
        prompt = self._pending[0]
        start = self.blocks.find_window(prompt.num_blocks)
        if start is None:
            going = self._demotable()
            missing = self.blocks.pinned_blocks + prompt.num_blocks - self.blocks.budget_blocks
            if sum(p.num_blocks for p in going) >= missing:
                while start is None and going:
                    self._demote(going.pop(0))
                    start = self.blocks.find_window(prompt.num_blocks)
        while start is None and prompt.pin == PinClass.HARD and (going := self._displaceable()):
            self._displace(going[0])
            start = self.blocks.find_window(prompt.num_blocks)
        return start

    def begin_prefill(self, start: int) -> PinnedPrompt:
        """The first pending prompt gets the (emptied) blocks from `start` on and is computed from now, or loaded where
        a tier has it."""
        prompt = self._pending[0]
        may_load = self.tiers.can_load(prompt)
        self._enter(prompt, PromptState.LOADING)
        prompt.place(self.blocks.pin(prompt.id, start, prompt.num_blocks))
        self.pinned_tokens += prompt.num_own_tokens
        if may_load:
            self.tiers.begin_load(prompt)
        else:
            self._begin_computing(prompt)
        return prompt

    def _begin_computing(self, prompt: PinnedPrompt) -> None:
        self._enter(prompt, PromptState.COMPUTING)
        prompt.prefill_started = time.perf_counter()
        self.num_prefills += 1

    def fail_load(self, prompt: PinnedPrompt) -> None:
        """What a tier had of a prompt was worth nothing; it is computed, in the extent that it has."""
        self._begin_computing(prompt)

    def end_load(self, prompt: PinnedPrompt) -> list[Sequence]:
        """A prompt is back on the device; returns the sequences that waited for it."""
        if prompt.payer is not None:
            prompt.payer.num_cache_write_tokens -= prompt.num_own_tokens
        prompt.sequence.num_computed_tokens = prompt.num_tokens
        waiters = self.end_prefill()
        self._release_if_done(prompt)
        return waiters

    def end_save(self, prompt: PinnedPrompt) -> None:
        """The extent of a prompt has been copied to the host."""
        prompt.is_being_saved = False
        self._let_go(prompt)

    def end_prefill(self) -> list[Sequence]:
        """The last chunk of the prompt under computation is planned; returns the sequences that waited for it."""
        prompt = self.computing
        if prompt is None:
            raise RuntimeError("no system prompt is being computed")
        self._enter(prompt, PromptState.PINNED)
        prompt.payer = None
        prompt.touch(self._clock())
        waiters, prompt.waiters = prompt.waiters, []
        return waiters

    def note_prefill(self, prompt: PinnedPrompt) -> None:
        """The last chunk of a prompt has run. Keeps how long its prefill took; a prompt that was removed meanwhile goes
        only now, since its blocks were being written."""
        if not (prompt.doomed or prompt.is_being_saved):  # One that was declared anew meanwhile may be under way.
            prompt.is_being_saved = self.tiers.save(prompt)
        self._release_if_done(prompt)
        self.prefill_seconds.append(time.perf_counter() - prompt.prefill_started)

    def refuse_pending(self) -> list[Sequence]:
        """The first pending prompt finds no contiguous room. Its children continue its parent instead, its waiters
        read its parent or nothing; returns those of them that need not wait any more."""
        prompt = self._pending[0]
        parent = prompt.parent
        for child in list(prompt.children):
            self._promised_blocks -= child.num_blocks
            child.follow(parent)
            self._promised_blocks += child.num_blocks
        waiters, prompt.waiters = prompt.waiters, []
        prompt.readers -= len(waiters)
        self.num_readers -= len(waiters)
        want = Want(prompt.num_tokens, prompt.pin, prompt.ttl, prompt.source, prompt.scope)
        for seq in waiters:
            seq.system_prompt = None
            seq.num_cache_write_tokens = max(0, seq.num_cache_write_tokens - prompt.num_own_tokens)
            self.outcomes[Outcome.BUSY.value] += not seq.goes_on
            self._note_refusal(prompt.token_ids, want, Outcome.BUSY, seq)
            if parent is not None:
                self._attach(seq, parent)
        prompt.payer = None
        if prompt.pin != PinClass.HARD and self.tiers.is_on_host(prompt):
            self._enter(prompt, PromptState.HOST)
            self._release_if_done(prompt)
        else:
            self._forget(prompt)
        return [seq for seq in waiters if not self.is_waiting(seq)]

    def check_integrity(self, readers: dict[str, int]) -> None:
        """Raises AssertionError when the books do not add up.

        Args:
            readers: Unfinished attached sequences by prompt id, counted by the caller.
        """
        self.blocks.check_integrity()
        prompts = list(self._prompts.values())
        extents = {p.id: p.extent for p in prompts if p.extent is not None}
        assert extents == self.blocks.extents, (extents, self.blocks.extents)
        for p in prompts:
            assert p.readers == readers.get(p.id, 0), (p.id, p.readers, readers.get(p.id, 0))
            assert len(p.waiters) <= p.readers
            assert (p.state == PromptState.PENDING) == (p in self._pending)
            assert (p.state in (PromptState.PENDING, PromptState.HOST)) == (p.extent is None)
            assert (p.state in (PromptState.COMPUTING, PromptState.LOADING)) == (p is self.computing)
            assert p.state != PromptState.HOST or (self.tiers.is_on_host(p) and not p.is_held), p
            assert p.children == {c for c in prompts if c.parent is p}, (p, p.children)
            assert p.depth <= MAX_CHAIN and p.num_blocks == self._blocks_of(p.num_own_tokens), p
            if p.parent is not None:
                assert self._prompts.get(p.parent.id) is p.parent, (p, "its parent is gone")
                assert p.token_ids[: p.start] == p.parent.token_ids
                assert self._may_extend(p.scope, p.parent.scope)
                assert p.extent is None or p.parent.state == PromptState.PINNED, (p, p.parent)
                assert p.last_used <= p.parent.last_used
            if p.extent is not None:
                assert sum(e.num_tokens for e in p.prefix) == p.num_tokens, p.prefix
        self.tiers.check_integrity(self._prompts)
        assert {p.id for tree in self._trees.values() for p in tree} == set(self._prompts)
        assert self._promised_blocks == sum(p.num_blocks for p in self._pending)
        assert self.num_readers == sum(readers.values()), (self.num_readers, readers)
        assert self.pinned_tokens == sum(p.num_own_tokens for p in prompts if p.extent is not None)
        assert set(readers) <= set(self._prompts), set(readers) - set(self._prompts)


def _longer(a: float | None, b: float | None) -> float | None:
    """The longer of two ttls, None being without end."""
    return None if a is None or b is None else max(a, b)
