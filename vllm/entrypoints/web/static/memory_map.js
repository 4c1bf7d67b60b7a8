// KV memory drawn to scale: blocks of requests, what is free, the wall, and behind it each extent.

import { sum } from "./api.js";
import { count, fill, h, percent, short, svg } from "./dom.js";
import { nameOf } from "./prompt_dialogs.js";
import { t } from "./texts.js";

const WITHOUT_EXTENT = new Set(["pending", "host", "removed"]);

/** What a map shows, as elements.
 * @param found metrics @param prompts those of the pool; empty where the server does not tell them */
export function memoryMap(found, prompts) {
  const of = (state, engine = {}) => sum(found, "vllm:system_prompt_pool_tokens", { state, ...engine });
  const pinned = of("pinned");
  const probation = of("probation");
  let [total, own] = [0, 0];
  // Several engines have a memory each; they are drawn as one.
  for (const { labels } of found["vllm:cache_config_info"] ?? []) {
    const engine = { engine: labels.engine };
    const tokens = Number(labels.num_gpu_blocks) * Number(labels.block_size);
    total += tokens;
    own += sum(found, "vllm:kv_cache_usage_perc", engine) * (tokens - of("pinned", engine) - of("probation", engine));
  }
  const free = Math.max(0, total - pinned - probation - own);
  const budget = sum(found, "vllm:system_prompt_pool_budget_tokens");
  const share = (tokens) => `${(100 * tokens) / total}%`;
  const part = (name, tokens) => h("span", { class: `part ${name}`, style: { "flex-basis": share(tokens) } });
  const said = { total: count(total), own: count(own), free: count(free), pinned: count(pinned), probation: count(probation) };
  const behind = (pinned + probation) / total;

  const extents = prompts.filter((prompt) => prompt.num_blocks > 0 && !WITHOUT_EXTENT.has(prompt.state));
  return [
    h("div", { class: "row between" }, h("h2", {}, t("memory")), h("span", { class: "faint" }, t("memory-size", { tokens: short(total) }))),
    h("div", { class: "map", role: "img", "aria-label": t("memory-said", said) },
      h("div", { class: "bar" },
        part("own", own), part("free", free),
        behind > 0 && h("span", { class: "wall" }),
        part("probation", probation), part("pinned", pinned)),
      budget > 0 && budget < total && h("span", { class: "limit", style: { left: share(total - budget) }, title: t("limit") })),
    h("ul", { class: "legend" },
      item("own", t("own-blocks"), own, total), item("free", t("free"), free, total),
      item("wallmark", t("wall")), item("limitmark", t("limit")),
      item("probation", t("probation"), probation, total), item("pinned", t("pinned"), pinned, total),
      of("host") > 0 && item("host", t("host"), of("host"))),
    behind > 0 && extents.length > 0 ? enlarged(extents, 1 - behind) : behind > 0 ? null : h("p", { class: "faint" }, t("no-extents")),
    disk(found),
  ];
}

const item = (name, text, tokens, total) =>
  h("li", {}, h("span", { class: `swatch ${name}` }), text,
    tokens != null && h("span", { class: "amount" }, total ? `${short(tokens)} · ${percent(tokens / total, tokens / total < 0.1 ? 1 : 0)}` : short(tokens)));

/** The strip behind the wall over the whole width, with the rays of a magnifying glass above it. */
function enlarged(extents, wallAt) {
  const rays = svg("svg", { class: "rays", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("path", { d: `M${100 * wallAt} 0 L100 0 L100 10 L0 10 Z` }));
  const details = h("p", { class: "details faint", "aria-live": "polite" }, t("extents"));
  const sorted = [...extents].sort((a, b) => (a.state === "probation" ? 0 : 1) - (b.state === "probation" ? 0 : 1) || a.created - b.created);
  const segment = (prompt) => {
    const said = t("extent-said", { name: nameOf(prompt), tokens: count(prompt.num_tokens), state: t(`state-${prompt.state}`), readers: count(prompt.readers) });
    const show = () => fill(details, said);
    return h("a", { href: `#${prompt.id}`, class: "extent", "data-state": prompt.state, style: { "flex-grow": String(prompt.num_blocks) },
      title: said, onmouseenter: show, onfocus: show,
      onclick: (event) => { event.preventDefault(); flash(prompt.id); } },
      h("span", { class: "unseen" }, said),
      h("span", { class: "label", "aria-hidden": "true" }, nameOf(prompt)),
      h("span", { class: "label faint", "aria-hidden": "true" }, short(prompt.num_tokens)),
      prompt.readers > 0 && h("span", { class: "reads", "aria-hidden": "true" }, count(prompt.readers)));
  };
  return h("div", { class: "enlarged" }, rays, h("div", { class: "bar extents" }, sorted.map(segment)), details);
}

function flash(id) {
  const row = document.getElementById(id);
  row?.scrollIntoView({ block: "center" });
  row?.querySelector("button")?.focus({ preventScroll: true });
}

function disk(found) {
  const done = (op) => sum(found, "vllm:system_prompt_snapshot_total", { op, outcome: "ok" });
  return done("save") + done("load") > 0 &&
    h("p", { class: "faint" }, t("disk", { saved: count(done("save")), loaded: count(done("load")) }));
}
