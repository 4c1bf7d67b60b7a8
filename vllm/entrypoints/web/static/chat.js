// A chat with the model that is served. It is kept while the page is open.

import { ask, askJson, events } from "./api.js";
import { count, duration, fill, h } from "./dom.js";
import { explainBody } from "./explain.js";
import { keyForm } from "./keys.js";
import { t } from "./texts.js";

const settings = { system: "You are a helpful assistant. Answer in one or two sentences.", temperature: 0.7, top_p: 0.95, max_tokens: 256, tools: "" };
let turns = [];
let running = null;
let parts = null;

export function enter(main) {
  parts = {
    log: h("div", { class: "log", role: "log", "aria-label": t("chat") }),
    problem: h("div", { role: "alert" }),
    text: h("textarea", { id: "message", rows: 2, placeholder: t("message-hint"), onkeydown: onKey }),
    send: h("button", { class: "primary" }),
  };
  const form = h("form", { class: "composer" }, h("label", { for: "message", class: "unseen" }, t("message")), parts.text, parts.send);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else send();
  });
  main.append(
    h("h1", { class: "unseen" }, t("chat")),
    h("div", { class: "chat" },
      h("details", { class: "card", open: innerWidth > 900 }, h("summary", {}, t("settings")), settingsForm()),
      h("div", { class: "conversation" }, parts.log, parts.problem, form,
        h("div", { class: "row end" },
          h("button", { type: "button", class: "quiet", onclick: () => explainBody(body()) }, t("explain-chat")),
          h("button", { type: "button", class: "quiet", onclick: restart }, t("new-chat"))))),
  );
  draw();
}

function settingsForm() {
  const field = (key, name, attributes) => {
    const tag = attributes.rows ? "textarea" : "input";
    const input = h(tag, { id: `s-${name}`, ...attributes, oninput: () => (settings[name] = attributes.type ? Number(input.value) : input.value) });
    input.value = settings[name];
    return h("div", {}, h("label", { for: `s-${name}` }, t(key)), input);
  };
  return h("div", { class: "fields" },
    field("system-text", "system", { rows: 7 }),
    h("div", { class: "three" },
      field("temperature", "temperature", { type: "number", min: 0, max: 2, step: 0.1 }),
      field("top-p", "top_p", { type: "number", min: 0.05, max: 1, step: 0.05 }),
      field("max-tokens", "max_tokens", { type: "number", min: 1, step: 1 })),
    field("tools", "tools", { rows: 3, spellcheck: "false", class: "mono" }));
}

function onKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) send();
}

function restart() {
  running?.abort();
  turns = [];
  fill(parts.problem);
  draw();
  parts.text.focus();
}

/** The request that the next answer would be asked with. */
function body() {
  const messages = turns.filter((turn) => turn.text || turn.calls?.length).map(asMessage).flat();
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  const made = { messages: [...system, ...messages], temperature: settings.temperature, top_p: settings.top_p, max_tokens: settings.max_tokens };
  if (settings.tools.trim()) made.tools = readTools();
  return made;
}

function readTools() {
  try {
    const tools = JSON.parse(settings.tools);
    if (!Array.isArray(tools)) throw new Error("[…]");
    return tools;
  } catch (error) {
    throw new Error(t("tools-wrong", { error: error.message }));
  }
}

/** A turn as the API has it. A call gets no result here, so it goes back as the text that it was. */
function asMessage(turn) {
  const calls = (turn.calls ?? []).map((call) => `${call.name}(${call.arguments})`);
  return { role: turn.role, content: [turn.text, ...calls].filter(Boolean).join("\n") };
}

async function send() {
  const text = parts.text.value.trim();
  if (!text) return;
  fill(parts.problem);
  turns.push({ role: "user", text });
  const turn = { role: "assistant", text: "", reasoning: "", calls: [], line: "" };
  running = new AbortController();
  const started = performance.now();
  try {
    const request = { ...body(), stream: true, stream_options: { include_usage: true } };
    parts.text.value = "";
    turns.push(turn);
    draw();
    request.model = (await askJson("v1/models")).data[0].id;
    const response = await ask("v1/chat/completions", { method: "POST", body: request, signal: running.signal });
    let first = null;
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      if (takeIn(turn, delta) && first === null) first = performance.now();
      if (event.usage) turn.line = lineOf(event.usage, started, first ?? performance.now());
      draw();
    }
  } catch (error) {
    if (error.name === "AbortError") turn.line = t("stopped");
    else {
      turns = turns.filter((one) => one !== turn);
      fill(parts.problem, error.status === 401 ? keyForm(error, "user") : h("p", { class: "bad" }, error.message));
    }
  } finally {
    running = null;
    draw();
  }
}

/** Adds a piece of the answer to a turn, and says whether there was any. */
function takeIn(turn, delta) {
  turn.text += delta.content ?? "";
  turn.reasoning += delta.reasoning_content ?? "";
  for (const piece of delta.tool_calls ?? []) {
    const call = (turn.calls[piece.index] ??= { name: "", arguments: "" });
    call.name += piece.function?.name ?? "";
    call.arguments += piece.function?.arguments ?? "";
  }
  return Boolean(delta.content || delta.reasoning_content || delta.tool_calls);
}

function lineOf(usage, started, first) {
  const seconds = (performance.now() - first) / 1000;
  return t("answer-line", {
    cached: count(usage.prompt_tokens_details?.cached_tokens ?? 0),
    prompt: count(usage.prompt_tokens),
    first: duration((first - started) / 1000),
    rate: usage.completion_tokens > 1 && seconds > 0 ? count((usage.completion_tokens - 1) / seconds) : "–",
  });
}

function draw() {
  const atEnd = parts.log.scrollHeight - parts.log.scrollTop - parts.log.clientHeight < 60;
  fill(parts.log, turns.length ? turns.map(bubble) : h("p", { class: "faint empty" }, t("chat-empty")));
  parts.log.setAttribute("aria-busy", String(running !== null));
  parts.send.textContent = t(running ? "stop" : "send");
  if (atEnd) parts.log.scrollTop = parts.log.scrollHeight;
}

const bubble = (turn) =>
  h("article", { class: `turn ${turn.role}` },
    h("h2", { class: "who" }, t(turn.role === "user" ? "you" : "model")),
    turn.reasoning && h("details", {}, h("summary", {}, t("reasoning")), h("p", { class: "text faint" }, turn.reasoning)),
    h("p", { class: "text" }, turn.text),
    (turn.calls ?? []).map((call) => h("div", { class: "call" }, h("strong", {}, t("tool-call", { name: call.name })), h("pre", {}, call.arguments))),
    turn.line && h("p", { class: "faint measured" }, turn.line));
