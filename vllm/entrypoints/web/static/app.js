// The frame around the views: which one is shown, in which language and colours, and how fresh its figures are.

import { ask, askJson } from "./api.js";
import { fill, h } from "./dom.js";
import { choose, languages, language, t } from "./texts.js";
import * as chat from "./chat.js";
import * as explain from "./explain.js";
import * as now from "./now.js";
import * as pool from "./pool.js";

const VIEWS = { pool, now, chat, explain };
const REFRESH_MS = 2000;
const THEMES = ["auto", "light", "dark"];
const main = document.getElementById("main");
let shown = null;
let entered = 0;
let theme = localStorage.getItem("theme") ?? "auto";

function drawFrame() {
  document.querySelector("[data-text=skip]").textContent = t("skip");
  document.title = `${t(shown)} · ${t("title")}`;
  const nav = document.getElementById("nav");
  nav.setAttribute("aria-label", t("views"));
  fill(
    nav,
    Object.keys(VIEWS).map((name) => h("a", { href: `#${name}`, "aria-current": name === shown && "page" }, t(name))),
  );
  const other = languages.find((name) => name !== language());
  const button = document.getElementById("language");
  button.textContent = other === "zh-CN" ? "中文" : "English";
  button.lang = other;
  document.getElementById("theme").textContent = t(`theme-${theme}`);
}

function show(focus = false) {
  const asked = location.hash.slice(1);
  if (asked === "main") return;
  VIEWS[shown]?.leave?.();
  shown = asked in VIEWS ? asked : "pool";
  entered += 1;
  drawFrame();
  fill(main);
  VIEWS[shown].enter(main);
  if (focus) main.focus({ preventScroll: true });
  refresh();
}

let refreshing = false;

async function refresh() {
  if (refreshing || document.hidden) return;
  refreshing = true;
  const [view, visit] = [shown, entered];
  const live = document.getElementById("live");
  try {
    await VIEWS[view].refresh?.();
    if (!VIEWS[view].refresh) await ask("health");
    live.dataset.state = "on";
    setText(live, t("live"));
  } catch (error) {
    // A server that is gone for a moment: the page keeps what it shows, and says that it is old.
    live.dataset.state = "off";
    setText(live, error.status ? error.message : t("no-answer"));
  } finally {
    refreshing = false;
  }
  if (visit !== entered) refresh();
}

// A status is read out when it changes, so it changes only with what it says.
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function applyTheme() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

async function showModel() {
  const model = document.getElementById("model");
  try {
    const served = (await askJson("v1/models")).data[0];
    model.textContent = served.id.split("/").pop();
    model.title = served.id;
  } catch (error) {
    model.textContent = error.status === 401 ? t("key-needed") : "–";
  }
}

document.getElementById("language").addEventListener("click", () => {
  choose(languages.find((name) => name !== language()));
  show();
});
document.getElementById("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  localStorage.setItem("theme", theme);
  applyTheme();
  show();
});
addEventListener("hashchange", () => show(true));
addEventListener("keys-changed", () => {
  showModel();
  show();
});
document.addEventListener("visibilitychange", refresh);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show());

choose(language());
applyTheme();
showModel();
show();
setInterval(refresh, REFRESH_MS);
