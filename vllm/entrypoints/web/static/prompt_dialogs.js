// Dialogs that pin a prompt, change its name and time to live, and release it.

import { askJson } from "./api.js";
import { h } from "./dom.js";
import { t } from "./texts.js";

const PROMPTS = "v1/system_prompts";

export const nameOf = (prompt) => prompt.name ?? prompt.id.slice(0, 11);

export function pinPrompt(done) {
  const text = h("textarea", { id: "d-text", rows: 8, required: true });
  const [name, ttl] = nameAndTtl({});
  const hard = h("input", { type: "checkbox", id: "d-hard", checked: true });
  const fields = [label("d-text", "system-text"), text, ...labelled(name, ttl), h("label", { class: "check" }, hard, t("hard-label"))];
  open(t("pin-one"), fields, t("pin"), done, () =>
    askJson(PROMPTS, {
      kind: "admin",
      method: "POST",
      body: { messages: [{ role: "system", content: text.value }], name: name.value || null, ttl: seconds(ttl), pin: hard.checked ? "hard" : "soft" },
    }));
}

export function editPrompt(prompt, done) {
  const [name, ttl] = nameAndTtl(prompt);
  open(nameOf(prompt), labelled(name, ttl), t("save"), done, () =>
    askJson(`${PROMPTS}/${prompt.id}`, { kind: "admin", method: "PATCH", body: { name: name.value || null, ttl: seconds(ttl) } }));
}

export function unpinPrompt(prompt, done) {
  open(t("unpin-ask", { name: nameOf(prompt) }), [h("p", {}, t("unpin-why"))], t("unpin"), done, () =>
    askJson(`${PROMPTS}/${prompt.id}`, { kind: "admin", method: "DELETE" }));
}

const nameAndTtl = (prompt) => [
  h("input", { id: "d-name", value: prompt.name ?? "", autocomplete: "off" }),
  h("input", { id: "d-ttl", type: "number", min: 1, step: "any", value: prompt.ttl ?? "" }),
];
const labelled = (name, ttl) => [label("d-name", "name"), name, label("d-ttl", "ttl-label"), ttl];
const label = (id, key) => h("label", { for: id }, t(key));
const seconds = (input) => (input.value === "" ? null : Number(input.value));

/** Asks, and does it; an error of the server is shown and the dialog stays. */
function open(title, fields, action, done, send) {
  const problem = h("p", { class: "bad", role: "alert" });
  const submit = h("button", { class: "primary" }, action);
  const cancel = h("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, t("cancel"));
  const form = h("form", { class: "fields" }, h("h2", { id: "d-title" }, title), fields, problem, h("div", { class: "row end" }, cancel, submit));
  const dialog = h("dialog", { "aria-labelledby": "d-title", onclose: () => dialog.remove() }, form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    submit.disabled = true;
    try {
      await send();
      dialog.close();
      done();
    } catch (error) {
      problem.textContent = error.message;
      submit.disabled = false;
    }
  });
  document.body.append(dialog);
  dialog.showModal();
}
