"""The system prompts that the pool knows: by id, and by their tokens."""

from __future__ import annotations

from vllm.core.pinned_prompt import MAX_DEPTH, PinnedPrompt
from vllm.core.prompt_index import PromptIndex, may_extend


class PromptRegistry:
    """Owns which prompts there are. A prompt is in it from its registration until it is removed.

    Attributes:
        index: The same prompts by their tokens and by who may read them.
    """

    def __init__(self) -> None:
        self.index = PromptIndex()
        self._prompts: dict[str, PinnedPrompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, key: str) -> bool:
        return key in self._prompts

    def __getitem__(self, key: str) -> PinnedPrompt:
        """Raises KeyError where there is no such prompt."""
        return self._prompts[key]

    def get(self, key: str) -> PinnedPrompt | None:
        return self._prompts.get(key)

    def prompts(self) -> list[PinnedPrompt]:
        """All prompts, the oldest registration first."""
        return list(self._prompts.values())

    def add(self, prompt: PinnedPrompt) -> None:
        self._prompts[prompt.id] = prompt
        self.index.insert(prompt)

    def remove(self, prompt: PinnedPrompt) -> None:
        del self._prompts[prompt.id]
        self.index.remove(prompt)

    def check_integrity(self) -> None:
        """Raises AssertionError when the index and the chains of prompts do not fit the prompts."""
        prompts = self.prompts()
        assert {p.id for p in self.index} == set(self._prompts)
        for p in prompts:
            assert p.children == {c for c in prompts if c.parent is p}, (p, p.children)
            assert p.depth <= MAX_DEPTH, p
            if p.parent is not None:
                assert self._prompts.get(p.parent.id) is p.parent, (p, "its parent is gone")
                assert p.token_ids[: p.start] == p.parent.token_ids
                assert may_extend(p.scope, p.parent.scope)
