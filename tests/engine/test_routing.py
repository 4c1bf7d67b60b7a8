"""Which engine a request goes to."""

from __future__ import annotations

from vllm.engine.routing import EngineLoad, Router, prefixes
from vllm.token_ids import token_array

SYSTEM = list(range(2000))


def heads(system: list[int], own: list[int], tenant: str | None = None, salt: str | None = None):
    return prefixes(token_array(system + own), len(system) or None, None, (tenant, salt))


def send(router: Router, loads: list[EngineLoad], system: list[int], own: list[int], tenant: str | None = None) -> int:
    """Sends a request, which is done at once."""
    wanted = heads(system, own, tenant)
    picked = router.pick(len(system) + len(own), wanted)
    loads[picked].note(wanted)
    return picked


def test_a_request_goes_where_its_system_prompt_is() -> None:
    loads = [EngineLoad(), EngineLoad(), EngineLoad()]
    router = Router(loads)
    homes = {}
    for name in range(3):
        homes[name] = send(router, loads, [name, *SYSTEM], [1, 2, 3])
    assert sorted(homes.values()) == [0, 1, 2], "new ones spread"
    for turn in range(5):
        for name, home in homes.items():
            assert send(router, loads, [name, *SYSTEM], [turn] * 50) == home


def test_it_goes_elsewhere_once_the_wait_is_longer_than_the_prefill() -> None:
    loads = [EngineLoad(), EngineLoad()]
    router = Router(loads)
    home = send(router, loads, SYSTEM, [1])
    loads[home].num_outputs = 19
    assert send(router, loads, SYSTEM, [2]) == home
    loads[home].num_outputs = 21
    assert send(router, loads, SYSTEM, [3]) == 1 - home
    loads[home].num_outputs = 0
    loads[home].waiting_tokens = 1
    assert send(router, loads, SYSTEM, [4]) == 1 - home, "both have it now"


def test_the_next_turn_of_a_chat_goes_where_the_last_one_was() -> None:
    loads = [EngineLoad(), EngineLoad()]
    router = Router(loads)
    chats = [[chat] * 600 for chat in range(4)]
    homes = [send(router, loads, [], chat) for chat in chats]
    assert set(homes) == {0, 1}
    assert [send(router, loads, [], chat + [9] * 40) for chat in chats] == homes
    # One with the same words in another namespace shares nothing.
    known = [load.num_known(heads([], chats[0], salt="x")) for load in loads]
    assert known == [0, 0]
    # A system prompt is for all of them.
    home = send(router, loads, SYSTEM, [1], tenant="a")
    assert loads[home].num_known(heads(SYSTEM, [2], tenant="b")) == len(SYSTEM)


def test_closed_engines_get_nothing_while_another_is_open() -> None:
    loads = [EngineLoad(), EngineLoad()]
    router = Router(loads)
    home = send(router, loads, SYSTEM, [1])
    loads[home].is_open = False
    assert {send(router, loads, SYSTEM, [i]) for i in range(4)} == {1 - home}
    loads[1 - home].is_open = False
    assert router.pick(5, []) in (0, 1)
