// The view of the load: what the server does now, and did in the last hour.

import { askJson } from "./api.js";
import { Chart } from "./charts.js";
import { duration, fill, h, short } from "./dom.js";
import { t } from "./texts.js";

const KEPT = 720;
let charts = null;
let saved = null;
let since = null;
let columns = null;

export function enter(main) {
  const whole = (value) => short(value);
  const line = (key, colour, filled) => ({ label: t(key), colour, filled });
  charts = {
    throughput: new Chart(t("throughput"), [line("generated", "--own", true), line("reused", "--pinned", true), line("computed", "--probation")], whole),
    load: new Chart(t("load"), [line("running", "--own", true), line("waiting", "--probation")], whole),
    first: new Chart(t("first-token"), [line("mean", "--pinned")], duration),
    token: new Chart(t("per-token"), [line("mean", "--pinned")], duration),
  };
  saved = h("p", { class: "big" });
  since = h("p", { class: "faint" });
  main.append(h("h1", { class: "unseen" }, t("now")), h("section", { class: "hero" }, h("div", { class: "claim long" }, saved, since)),
    h("div", { class: "grid" }, Object.values(charts).map((chart) => chart.element)));
  columns = null;
}

export function leave() {
  Object.values(charts).forEach((chart) => chart.destroy());
}

export async function refresh() {
  const last = columns?.time.at(-1) ?? 0;
  const news = await askJson(`web/history?after=${last}`);
  columns ??= Object.fromEntries(Object.keys(news.columns).map((name) => [name, []]));
  for (const [name, values] of Object.entries(news.columns)) columns[name] = [...columns[name], ...values].slice(-KEPT);
  if (news.columns.time.length) draw(news.interval_s);
}

function draw(interval) {
  const { time } = columns;
  const rate = (name) => changes(columns[`vllm:${name}`], (delta, i) => delta / (time[i] - time[i - 1]));
  const mean = (name) => {
    const counts = columns[`vllm:${name}_count`];
    return changes(columns[`vllm:${name}_sum`], (delta, i) => (counts[i] > counts[i - 1] ? delta / (counts[i] - counts[i - 1]) : null));
  };
  const prompts = rate("prompt_tokens_total");
  const cached = rate("prompt_tokens_cached_total");
  const computed = prompts.map((value, i) => (value === null ? null : Math.max(0, value - cached[i])));
  charts.throughput.draw(time, [rate("generation_tokens_total"), cached, computed]);
  charts.load.draw(time, [columns["vllm:num_requests_running"], columns["vllm:num_requests_waiting"]]);
  charts.first.draw(time, [mean("time_to_first_token_seconds")]);
  charts.token.draw(time, [mean("inter_token_latency_seconds")]);

  const grown = (name) => columns[`vllm:${name}`].at(-1) - columns[`vllm:${name}`][0];
  const prefill = columns["vllm:system_prompt_prefill_seconds_sum"].at(-1) / columns["vllm:system_prompt_prefill_seconds_count"].at(-1);
  const tokens = grown("system_prompt_tokens_reused_total");
  const values = { tokens: short(tokens), time: duration(grown("system_prompt_requests_total") * prefill) };
  fill(saved, tokens > 0 ? t("hour-saved-line", values) : t("saved-none"));
  fill(since, t("last-hour", { seconds: interval }), " · ", t("since-start", { time: new Date(time[0] * 1000).toLocaleTimeString() }));
}

/** `make(delta, index)` of neighbouring totals; null for the first, and where a restart has set them back. */
function changes(totals, make) {
  return totals.map((value, i) => (i === 0 || value < totals[i - 1] ? null : make(value - totals[i - 1], i)));
}
