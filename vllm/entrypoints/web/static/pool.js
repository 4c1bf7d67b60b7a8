// The view of the pool: what it saves, how memory is divided, and each prompt.

import { ApiError, askJson, metrics, sum } from "./api.js";
import { ago, bytes, count, duration, fill, h, percent, short } from "./dom.js";
import { keyForm } from "./keys.js";
import { memoryMap } from "./memory_map.js";
import { editPrompt, nameOf, pinPrompt, unpinPrompt } from "./prompt_dialogs.js";
import { t } from "./texts.js";

const PROMPTS = "v1/system_prompts";
let parts = null;
let drawn = "";

export function enter(main) {
  drawn = "";
  parts = { hero: h("section", { class: "hero" }), memory: h("section", { class: "card" }), rest: h("div", { class: "stack" }) };
  main.append(h("h1", { class: "unseen" }, t("pool")), parts.hero, parts.memory, parts.rest);
}

export async function refresh() {
  const here = parts;
  const [found, list] = await Promise.all([metrics(), promptsOrError()]);
  // What is read out or focused stays as it is while nothing has changed; times of use age by the minute.
  const state = JSON.stringify([found["vllm:system_prompt_pool_tokens"], found["vllm:kv_cache_usage_perc"],
    found["vllm:system_prompt_requests_total"], list, Math.floor(Date.now() / 15000)]);
  if (here !== parts || state === drawn) return;
  drawn = state;
  drawHero(here.hero, found);
  fill(here.memory, memoryMap(found, list.data ?? []));
  keepingFocus(here.rest, () => {
    if (list instanceof ApiError) fill(here.rest, keyForm(list, "admin"));
    else fill(here.rest, warnings(list.warnings), table(list.data), refused(list.refused));
  });
}

/** The list, or why the server does not give it to us. A form for a key keeps what is typed into it. */
async function promptsOrError() {
  try {
    return await askJson(PROMPTS, { kind: "admin" });
  } catch (error) {
    if (error instanceof ApiError && [401, 403].includes(error.status)) return error;
    throw error;
  }
}

function drawHero(hero, found) {
  const outcomes = found["vllm:system_prompt_requests_total"] ?? [];
  const hits = sum(found, "vllm:system_prompt_requests_total", { outcome: "hit" });
  const all = outcomes.reduce((total, sample) => total + sample.value, 0);
  const saved = sum(found, "vllm:system_prompt_tokens_reused_total");
  const prefills = sum(found, "vllm:system_prompt_prefill_seconds_count");
  const seconds = prefills ? (hits * sum(found, "vllm:system_prompt_prefill_seconds_sum")) / prefills : NaN;
  const budget = sum(found, "vllm:system_prompt_pool_budget_tokens");
  const held = ["pinned", "probation"].reduce((n, state) => n + sum(found, "vllm:system_prompt_pool_tokens", { state }), 0);
  const [before, after] = t("saved-line").split("{tokens}");
  fill(
    hero,
    h("div", { class: "claim" },
      h("p", { class: "big" }, saved ? [before, h("strong", {}, short(saved)), after] : t("saved-none")),
      h("p", { class: "faint" }, t(saved ? "saved-why" : "saved-none-why"))),
    h("dl", { class: "figures" },
      figure("time-saved", hits && prefills ? `≈ ${duration(seconds)}` : "–", t("time-saved-why")),
      figure("hit-share", all ? percent(hits / all) : "–", t("hit-share-of", { hits: count(hits), all: count(all) })),
      figure("prompts-held", count(sum(found, "vllm:system_prompt_pinned")),
        t("prompts-held-of", { tokens: short(held), budget: short(budget) }))),
  );
}

const figure = (key, value, why) =>
  h("div", {}, h("dt", {}, t(key)), h("dd", { class: "value" }, value), h("dd", { class: "faint" }, why));

function table(prompts) {
  const head = ["name", "state", "tokens", "size", "uses", "saved", "readers", "last-used", "expires"];
  return h("section", { class: "card" },
    h("div", { class: "row between" }, h("h2", {}, t("prompts")),
      h("button", { type: "button", class: "primary", "data-key": "pin", onclick: () => pinPrompt(again) }, t("pin-one"))),
    prompts.length === 0
      ? h("p", { class: "faint" }, t("no-prompts"))
      : h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": t("prompts") },
          h("table", {},
            h("thead", {}, h("tr", {},
              head.map((key) => h("th", { scope: "col", class: NUMERIC.has(key) && "number" }, t(key))),
              h("th", { scope: "col" }, h("span", { class: "unseen" }, t("actions"))))),
            h("tbody", {}, [...prompts].sort((a, b) => b.last_used - a.last_used).map(row)))));
}

const NUMERIC = new Set(["tokens", "size", "uses", "saved", "readers"]);

function row(prompt) {
  const cell = (key, ...content) => h("td", { "data-label": t(key), class: NUMERIC.has(key) && "number" }, ...content);
  const button = (key, action) =>
    h("button", { type: "button", class: "quiet", "data-key": `${key} ${prompt.id}`, onclick: () => action(prompt, again),
      "aria-label": `${t(key)}: ${nameOf(prompt)}` }, t(key));
  return h("tr", { id: prompt.id },
    h("th", { scope: "row" }, h("span", { class: prompt.name ? "" : "mono" }, nameOf(prompt)),
      h("span", { class: "faint block" }, [t(`source-${prompt.source}`), prompt.pin === "hard" && t("pin-hard")].filter(Boolean).join(" · "))),
    cell("state", h("span", { class: "chip", "data-state": prompt.state }, t(`state-${prompt.state}`))),
    cell("tokens", count(prompt.num_tokens)),
    cell("size", bytes(prompt.num_bytes)),
    cell("uses", count(prompt.uses)),
    cell("saved", short(prompt.tokens_saved)),
    cell("readers", count(prompt.readers)),
    cell("last-used", ago(prompt.last_used)),
    cell("expires", prompt.expires ? t("in", { time: duration(Math.max(0, prompt.expires - Date.now() / 1000)) }) : t("never")),
    h("td", { class: "actions" }, button("edit", editPrompt), button("unpin", unpinPrompt)));
}

function warnings(found) {
  if (!found.length) return null;
  return h("section", { class: "card warning" },
    h("h2", {}, t("warnings")),
    found.map((span) =>
      h("div", { class: "varying" },
        h("p", {}, t("warning-line", { count: count(span.num_prompts), shared: count(span.num_shared_tokens), position: count(span.position) })),
        h("ul", { class: "examples" }, span.examples.map((text) => h("li", {}, h("mark", { class: "mono" }, text || t("no-text"))))))),
    h("p", { class: "faint" }, t("warning-help")));
}

function refused(found) {
  if (!found.length) return null;
  return h("section", { class: "card" },
    h("h2", {}, t("refused")),
    h("ul", { class: "plain" }, found.map((info) =>
      h("li", {}, t("refused-line", { tokens: count(info.num_tokens), count: count(info.requests), why: t(`outcome-${info.outcome}`), time: ago(info.last_seen) })))));
}

function again() {
  drawn = "";
  refresh();
}

/** Draws anew; the button that had the focus, or what is typed into a form for a key, is there again. */
function keepingFocus(element, draw) {
  const active = element.contains(document.activeElement) ? document.activeElement : null;
  if (active?.id === "key") return;
  const key = active?.dataset.key;
  draw();
  if (key) element.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}
