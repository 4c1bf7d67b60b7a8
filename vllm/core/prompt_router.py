"""What becomes of a request with a system prompt: it reads a known one, brings a new one, or runs unpinned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Several

from vllm.config import SystemPromptConfig
from vllm.core.demand import Demand
from vllm.core.pinned_prompt import MAX_DEPTH, BlockCount, Outcome, PinClass, PinnedPrompt, prompt_id
from vllm.core.pool_log import PoolLog
from vllm.core.prompt_index import may_extend
from vllm.core.prompt_life import PromptLife
from vllm.core.prompt_registry import PromptRegistry
from vllm.core.prompt_room import PromptRoom
from vllm.core.prompt_tiers import PromptTiers
from vllm.core.shared_heads import MIN_SHARED_TOKENS, SharedHeads
from vllm.core.wants import Decision, Want, longer, wants_of
from vllm.inputs import CacheMark
from vllm.sequence import Sequence
from vllm.token_ids import TokenIds


class PromptRouter:
    """Owns what has happened to requests: their outcomes, and the heads that long prompts share.

    Args:
        clock: Seconds since the epoch.

    Attributes:
        outcomes: Requests by `Outcome`.
        tokens_reused: Tokens that requests read from pinned prompts instead of computing them.
    """

    def __init__(
        self,
        config: SystemPromptConfig,
        registry: PromptRegistry,
        room: PromptRoom,
        life: PromptLife,
        demand: Demand,
        tiers: PromptTiers,
        log: PoolLog,
        clock: Callable[[], float],
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self.tokens_reused = 0
        self._config = config
        self._registry = registry
        self._room = room
        self._life = life
        self._demand = demand
        self._tiers = tiers
        self._log = log
        self._clock = clock
        self._heads = SharedHeads()

    def route(self, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark] = ()) -> Outcome | None:
        """See `SystemPromptPool.route`."""
        outcome = self._route(seq, num_system_tokens, marks)
        if outcome is not None:
            self.outcomes[outcome.value] += 1
        return outcome

    def _route(self, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark]) -> Outcome | None:
        in_play = bool(num_system_tokens or marks)
        if self._config.mode == "off":
            return Outcome.DISABLED if in_play else None
        if seq.sampling_params.prompt_logprobs is not None:
            # The request asks for the logits of every position, so every position is computed.
            return Outcome.PROMPT_LOGPROBS if in_play else None
        wants = wants_of(self._config, seq, num_system_tokens, marks) or self._shared_head(seq)
        self._demand.count_request()
        decision = self.decide(seq, wants)
        for want, refusal in decision.refused:
            self._note_refusal(seq.token_ids[: want.num_tokens], want, refusal, seq)
        lengths = {want.num_tokens: want for want in wants}
        for prompt in decision.known:
            if prompt.num_tokens in lengths:
                self._renew(prompt, lengths[prompt.num_tokens])
        leaf = decision.known[-1] if decision.known else None
        if leaf is not None:
            leaf.hits += 1
            leaf.tokens_saved += leaf.num_tokens
            self.tokens_reused += leaf.num_tokens
            leaf.use(self._demand.num_requests)
            # The request that brought the prompt was its first use, so this one ends its probation.
            self._life.promote(leaf)
        for want in decision.creates:
            leaf = self._life.register(seq.token_ids[: want.num_tokens], want, is_use=True)
            leaf.serve_by(seq.priority, seq.order)
            leaf.payer = seq
            seq.num_cache_write_tokens += leaf.num_own_tokens
        if leaf is None:
            return decision.refused[-1][1] if decision.refused else None
        self._life.attach(seq, leaf)
        leaf.touch(self._clock())
        if not decision.creates:
            return Outcome.HIT
        return Outcome.PROBATION if leaf.on_probation else Outcome.CREATED

    def decide(self, seq: Sequence, wants: list[Want]) -> Decision:
        """What would happen to a request that asks for `wants`; changes nothing."""
        path = [p for p in self._registry.index.readable(seq) if p.num_tokens < seq.num_prompt_tokens]
        known = [p for p in path if not p.doomed]
        doomed = {p.num_tokens for p in path if p.doomed}
        longest = known[-1].num_tokens if known else 0
        chain = [(p.num_tokens, p.depth, p.scope) for p in known]
        creates: list[Want] = []
        refused: list[tuple[Want, Outcome]] = []
        size = BlockCount(0)
        for want in wants:
            n = want.num_tokens
            if n <= longest:
                continue
            start, depth = max(
                ((m, d) for m, d, scope in chain if m < n and d < MAX_DEPTH and may_extend(want.scope, scope)),
                default=(0, 0),
            )
            more = size + self._room.blocks_of(n - start)
            if n in doomed:
                refusal: Outcome | None = Outcome.BUSY
            elif self._config.mode == "declared" and want.pin != PinClass.HARD:
                refusal = Outcome.DISABLED
            else:
                refusal = self._room.refusal(seq.token_ids[:n], want, more, known)
            if refusal is not None:
                refused.append((want, refusal))
                continue
            size = more
            creates.append(want)
            chain.append((n, depth + 1, want.scope))
        return Decision(known, creates, refused)

    def note_refused(self, prompt: PinnedPrompt) -> None:
        """Records that the waiters of a pending prompt run without it, since it finds no room."""
        want = Want(prompt.num_tokens, prompt.pin, prompt.ttl, prompt.source, prompt.scope)
        for seq in prompt.waiters:
            self.outcomes[Outcome.BUSY.value] += 1
            self._note_refusal(prompt.token_ids, want, Outcome.BUSY, seq)

    def _shared_head(self, seq: Sequence) -> list[Want]:
        """The head that a long prompt without a system part has in common with an earlier one of its namespace."""
        if self._config.mode != "auto" or seq.num_prompt_tokens <= MIN_SHARED_TOKENS:
            return []
        size = self._heads.see(seq)
        if not size:
            return []
        pinned = self._registry.index.readable(seq)
        if pinned and size - pinned[-1].num_tokens < MIN_SHARED_TOKENS:
            return []
        return [Want(size, PinClass.AUTOMATIC, self._config.ttl, "shared_prefix", seq.namespace, reused=True)]

    def _renew(self, prompt: PinnedPrompt, want: Want) -> None:
        """Takes in that a request asks for a known prompt again; this may only make the pin firmer and longer."""
        if prompt.source in ("declared", "preload"):
            return
        prompt.pin = max(prompt.pin, want.pin)
        if prompt.pin == PinClass.HARD:
            self._life.promote(prompt)
        ttl = longer(prompt.ttl, want.ttl)
        if ttl != prompt.ttl:
            prompt.ttl = ttl
            self._life.track_ttl(prompt)
        self._tiers.note_change(prompt)

    def _note_refusal(self, token_ids: TokenIds, want: Want, outcome: Outcome, seq: Sequence) -> None:
        key = prompt_id(token_ids, want.scope)
        if outcome in (Outcome.OVER_BUDGET, Outcome.BUSY) and key not in self._registry:
            self._demand.note(key)
        self._log.note_refusal(key, token_ids, want, outcome, seq, self._clock())
