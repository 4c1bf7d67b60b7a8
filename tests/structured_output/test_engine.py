"""Constrained outputs in the engine: batches, preemption, steps in flight, `n`, and what other parameters ask."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import numpy as np
import pytest

from tests.engine.helpers import Request, add, assert_nothing_held, finish, greedy, run, tokens
from vllm.engine.llm_engine import LLMEngine
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.step import StepPlan
from vllm.structured_output.grammars import GuidanceGrammar
from vllm.structured_output.matcher import TOO_COSTLY, MatchingCost, TokenMatcher
from vllm.structured_output.vocabulary import Vocabulary
from vllm.worker.running_step import RunningStep

MakeEngine = Callable[..., LLMEngine]

PROMPT = Request([464, 3290, 318, 257, 845, 1263, 5044])
CODE = r"[A-F]{3}-\d{4}"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"enum": [1, 22, 333]}},
    "required": ["name", "age"],
}


def constrained(seed: int = 0, **fields: object) -> SamplingParams:
    """Draws at a temperature, in the form that the structured outputs `fields` ask for."""
    others = {k: fields.pop(k) for k in list(fields) if k in SamplingParams.__struct_fields__}
    options = {"temperature": 2.0, "max_tokens": 60, "seed": seed, **others}
    return SamplingParams(structured_outputs=StructuredOutputsParams(**fields), **options)


def text(output: RequestOutput) -> str:
    assert output.outputs[0].finish_reason == "stop"
    return output.outputs[0].text


def test_every_kind_of_form_is_kept(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    person = {"begin": "<p>", "schema": PERSON, "end": "</p>"}
    forms: list[dict[str, object]] = [
        {"json": PERSON, "disable_any_whitespace": True},
        {"json": json.dumps(PERSON), "disable_any_whitespace": True},
        {"regex": CODE},
        {"choice": ["yes", "no", "perhaps"]},
        {"grammar": 'root ::= "x" [a-c]{2,4} "!"'},
        {"grammar": 'start: "x" /[a-c]{2,4}/ "!"'},
        {"structural_tag": {"format": {"type": "regex", "pattern": CODE}}},
        {"regex": CODE, "after": "q"},
        {"structural_tag": {"structures": [person], "triggers": ["<p>"]}, "max_tokens": 5, "logit_bias": {0: -5.0}},
    ]
    outputs = run(engine, [PROMPT] * len(forms), [constrained(i, **form) for i, form in enumerate(forms)])
    one, same, code, choice, gbnf, lark, tag, after = [output.outputs[0].text for output in outputs[:8]]
    for found in (one, same):
        assert json.loads(found)["age"] in (1, 22, 333)
    assert re.fullmatch(CODE, code)
    assert choice in ("yes", "no", "perhaps")
    assert re.fullmatch("x[a-c]{2,4}!", gbnf)
    assert re.fullmatch("x[a-c]{2,4}!", lark)
    assert re.fullmatch(CODE, tag)
    _, mark, rest = after.partition("q")
    assert not mark or re.fullmatch(CODE, rest) or outputs[7].outputs[0].finish_reason == "length"
    assert outputs[8].outputs[0].finish_reason in ("stop", "length")


@pytest.mark.usefixtures("pipeline_depth")
def test_a_form_is_kept_in_a_batch_and_after_preemption_and_leaves_neighbours_alone(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    wanted = [constrained(i, regex=CODE + r"( [A-F]{3}-\d{4}){2}") for i in range(6)]
    alone = [run(engine, [PROMPT], params)[0] for params in wanted]
    assert all(re.fullmatch(r"[A-F]{3}-\d{4}( [A-F]{3}-\d{4}){2}", text(output)) for output in alone)
    free = [SamplingParams(temperature=0.4, seed=i, top_k=30, max_tokens=24, ignore_eos=True) for i in range(6)]
    free_alone = [tokens(run(engine, [PROMPT], params))[0] for params in free]
    together = run(engine, [PROMPT] * 12, [p for pair in zip(wanted, free, strict=True) for p in pair])
    assert tokens(together)[::2] == tokens(alone)
    assert tokens(together)[1::2] == free_alone

    # Five blocks for a request's two or three each: the later ones are preempted again and again.
    small = make_tiny(max_model_len=64, num_gpu_blocks_override=5)
    assert tokens(run(small, [PROMPT] * 6, wanted)) == tokens(alone)
    assert small.core.scheduler.num_preemptions > 0
    assert_nothing_held(small)


@pytest.mark.usefixtures("pipeline_depth")
def test_each_of_n_outputs_follows_the_form_by_itself(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    (output,) = run(engine, [PROMPT], constrained(regex=CODE, n=4))
    texts = [choice.text for choice in output.outputs]
    assert all(re.fullmatch(CODE, t) for t in texts)
    assert len(set(texts)) > 1
    assert_nothing_held(engine)


def test_a_complete_form_ends_the_output_whatever_else_is_asked(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    (output,) = run(engine, [PROMPT], constrained(choice=["yes", "no"], min_tokens=20, ignore_eos=True))
    assert text(output) in ("yes", "no")
    yes = engine.tokenizer.encode("yes")[0]
    (output,) = run(engine, [PROMPT], constrained(choice=["yes", "no"], allowed_token_ids=[yes]))
    assert text(output) == "yes"
    (output,) = run(engine, [PROMPT], constrained(choice=["yes", "no"], bad_words=["yes"]))
    assert text(output) == "no"
    (output,) = run(engine, [PROMPT], constrained(regex=CODE, max_tokens=3))
    assert output.outputs[0].finish_reason == "length"


def test_log_probabilities_are_the_models_own(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    (output,) = run(engine, [PROMPT], constrained(regex="Q", logprobs=1, max_tokens=1))
    (free,) = run(engine, [PROMPT], greedy(1, logprobs=1))
    found, expected = output.outputs[0].logprobs, free.outputs[0].logprobs
    assert found and expected
    (best,) = expected[0].values()
    assert {t: entry.logprob for t, entry in found[0].items()}[free.outputs[0].token_ids[0]] == best.logprob


def test_control_tokens_are_no_text_of_a_form(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    ids = engine.tokenizer.all_special_ids
    biased = constrained(regex=".{1,40}", max_tokens=30, logit_bias={i: 100.0 for i in ids})
    (output,) = run(engine, [PROMPT], biased)
    assert not set(output.outputs[0].token_ids[:-1]) & set(ids)


def test_a_form_that_grows_costly_ends_its_request_alone(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    # Every split of a run of letters is another way to read it; the compiler, which tries outputs, sees only digits.
    grammar = 'root ::= [0-9]{120} list\nlist ::= list list | "b" | list list list'
    letter = {engine.tokenizer.encode("b")[0]: 60.0}
    add(engine, "costly", PROMPT, constrained(grammar=grammar, max_tokens=480, logit_bias=letter))
    add(engine, "other", PROMPT, greedy(400))
    seen: dict[str, RequestOutput] = {}
    with pytest.raises(VLLMValidationError, match="too long to match"):
        seen |= finish(engine)
    seen |= finish(engine)
    assert len(seen["other"].outputs[0].token_ids) == 400
    assert_nothing_held(engine)


def test_a_form_does_not_hold_its_output_back(make_tiny: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two steps in flight a constrained output gets a token from each step, as a free one does."""
    monkeypatch.setattr(CpuPlatform, "pipeline_depth", 2)
    engine = make_tiny()
    add(engine, "form", PROMPT, constrained(regex=r"[a-z]{200}", max_tokens=20))
    while engine.core._unready:
        engine.step()
    add(engine, "free", PROMPT, greedy(60))
    batches: list[int] = []
    submit = engine.core.executor.submit

    def note(plan: StepPlan) -> RunningStep:
        batches.append(len(plan.rows))
        return submit(plan)

    monkeypatch.setattr(engine.core.executor, "submit", note)
    finish(engine)
    both = [i for i, size in enumerate(batches) if size == 2]
    assert len(both) >= 15 and both == list(range(both[0], both[-1] + 1))


def test_the_outputs_of_a_request_share_what_matching_may_cost() -> None:
    cost = MatchingCost()
    cost.charge(0.06)
    assert cost.is_too_much
    cost.charge(0.0, 20)
    assert not cost.is_too_much
    vocabulary = Vocabulary([bytes([i]) for i in range(256)], 256, [0])
    grammar = GuidanceGrammar("start: /[ab]{5}/", vocabulary)
    first, second = (TokenMatcher(grammar, cost=cost) for _ in range(2))
    masks = np.zeros((2, 8), np.int32)
    first.fill(masks, 0)
    assert first.error is None and masks[0, 3] == 0b110
    cost.charge(1.0)
    second.fill(masks, 1)
    assert second.error == TOO_COSTLY


def test_a_request_may_be_aborted_while_its_form_is_loaded(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    add(engine, "gone", PROMPT, constrained(regex=CODE))
    engine.abort_request("gone")
    assert finish(engine) == {}
    assert_nothing_held(engine)


def test_random_forms_are_kept(make_tiny: MakeEngine) -> None:
    """Schemas of random shape: what comes is JSON that has their properties."""
    rng = random.Random(5)
    engine = make_tiny()

    def schema(depth: int) -> dict[str, object]:
        kind = rng.choice(["enum", "integer", "boolean", "object", "array"][: 5 if depth else 3])
        if kind == "enum":
            return {"enum": rng.sample(["x", "yy", 7, None, True], 2)}
        if kind == "object":
            names = rng.sample("abcdef", 2)
            return {"type": "object", "properties": {n: schema(depth - 1) for n in names}, "required": names}
        if kind == "array":
            return {"type": "array", "items": schema(depth - 1), "minItems": 1, "maxItems": 2}
        return {"type": kind} | ({"minimum": 0, "maximum": 99} if kind == "integer" else {})

    def fits(value: object, by: dict[str, object]) -> bool:
        if "enum" in by:
            return value in by["enum"]  # type: ignore[operator]
        if by["type"] == "object":
            properties: dict = by["properties"]  # type: ignore[assignment]
            return isinstance(value, dict) and all(fits(value[n], s) for n, s in properties.items())
        if by["type"] == "array":
            return isinstance(value, list) and all(fits(v, by["items"]) for v in value)  # type: ignore[arg-type]
        return isinstance(value, bool if by["type"] == "boolean" else int)

    schemas = [schema(2) for _ in range(12)]
    wanted = [constrained(i, json=s, disable_any_whitespace=True, max_tokens=200) for i, s in enumerate(schemas)]
    for output, by in zip(run(engine, [PROMPT] * len(wanted), wanted), schemas, strict=True):
        assert fits(json.loads(text(output)), by), (text(output), by)
