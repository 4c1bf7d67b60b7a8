// The view that says what the pool would do for a request, and why.

import { askJson } from "./api.js";
import { count, fill, h } from "./dom.js";
import { keyForm } from "./keys.js";
import { t } from "./texts.js";

const EXAMPLE = {
  messages: [
    { role: "system", content: "You are a helpful assistant. Answer in one or two sentences." },
    { role: "user", content: "What is a colophon?" },
  ],
};
let text = JSON.stringify(EXAMPLE, null, 2);
let result = null;

/** Shows the view with this body in it. */
export function explainBody(body) {
  text = JSON.stringify(body, null, 2);
  location.hash = "#explain";
}

export function enter(main) {
  const input = h("textarea", { id: "body", class: "mono", rows: 16, spellcheck: "false", oninput: () => (text = input.value) });
  input.value = text;
  result = h("div", { class: "stack", "aria-live": "polite" });
  const form = h("form", { class: "card fields" }, h("label", { for: "body" }, t("body")), input,
    h("div", { class: "row between" }, h("p", { class: "faint" }, t("explain-why")), h("button", { class: "primary" }, t("explain-it"))));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    explain();
  });
  main.append(h("h1", { class: "unseen" }, t("explain")), h("div", { class: "explain" }, form, result));
}

async function explain() {
  let body;
  try {
    body = JSON.parse(text);
  } catch (error) {
    fill(result, h("p", { class: "card bad" }, t("not-json", { error: error.message })));
    return;
  }
  try {
    const found = await askJson("v1/system_prompts?explain=1", { kind: "admin", method: "POST", body });
    fill(result, verdict(found), found.nearest && nearest(found.nearest), rendered(found));
  } catch (error) {
    fill(result, [401, 403].includes(error.status) ? keyForm(error, "admin") : h("p", { class: "card bad" }, error.message));
  }
}

function verdict(found) {
  const hit = found.outcome === "hit";
  const rest = found.prompt_tokens - found.pinned_tokens;
  const part = (name, tokens) => h("span", { class: `part ${name}`, style: { "flex-basis": `${(100 * tokens) / found.prompt_tokens}%` } });
  return h("section", { class: "card" },
    h("h2", {}, h("span", { class: "chip large", "data-state": hit ? "pinned" : "probation" }, t(hit ? "hit" : "miss"))),
    h("p", {}, t(`why-${found.outcome}`, { reason: found.reason })),
    h("div", { class: "bar thin", "aria-hidden": "true" }, part("pinned", found.pinned_tokens), part("own", rest)),
    h("p", { class: "faint" }, t("token-counts", { pinned: count(found.pinned_tokens), rest: count(rest) })));
}

function rendered(found) {
  const line = found.system_tokens ? t("boundary", { tokens: count(found.system_tokens) }) : t("no-boundary");
  return h("section", { class: "card" },
    h("h2", {}, t("rendered")),
    h("div", { class: "rendered", tabindex: 0, role: "region", "aria-label": t("rendered") },
      found.text.system && h("pre", { class: "system" }, found.text.system),
      h("p", { class: "boundary" }, h("span", {}, line)),
      h("pre", {}, found.text.own)));
}

function nearest(found) {
  const token = (side, key) => {
    const value = found[key];
    return h("div", {}, h("dt", {}, t(side)), h("dd", { class: "mono" }, h("mark", {}, value ? JSON.stringify(value.text) : t("ends")), value && h("span", { class: "faint" }, ` #${value.id}`)));
  };
  return h("section", { class: "card" },
    h("h2", {}, t("nearest")),
    h("p", {}, t("nearest-line", { name: found.name ?? found.id.slice(0, 11), tokens: count(found.num_tokens), position: count(found.position) })),
    h("pre", { class: "before" }, `…${found.before}`),
    h("dl", { class: "tokens" }, token("in-pool", "pinned_token"), token("in-request", "request_token")));
}
