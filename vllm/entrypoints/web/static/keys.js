// Asks for a key where the server wants one.

import { keys } from "./api.js";
import { h } from "./dom.js";
import { t } from "./texts.js";

/** A form for the key that an answer of 401 asks for; on other errors, the server's line alone. */
export function keyForm(error, kind) {
  if (error.status !== 401) {
    return h("section", { class: "card notice" }, h("h2", {}, t("operators-only")), h("p", {}, error.message));
  }
  const input = h("input", { type: "password", id: "key", autocomplete: "off", required: true });
  const form = h(
    "form",
    { class: "card notice" },
    h("h2", {}, t(kind === "admin" ? "admin-key" : "api-key")),
    h("p", {}, t(kind === "admin" ? "admin-key-why" : "api-key-why")),
    keys.get(kind) && h("p", { class: "bad", role: "alert" }, t("key-refused")),
    h("div", { class: "row" }, h("label", { for: "key", class: "unseen" }, t("key")), input, h("button", { class: "primary" }, t("use-key"))),
    h("p", { class: "faint" }, t("key-kept")),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    keys.set(kind, input.value.trim());
    dispatchEvent(new Event("keys-changed"));
  });
  return form;
}
