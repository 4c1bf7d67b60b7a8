// Elements, numbers and times as text.

/** An element: `h("p", {class: "x", onclick: f}, "text", child)`. Text is never read as HTML. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  set(element, attributes);
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

/** The same for SVG. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  set(element, attributes);
  element.append(...children);
  return element;
}

function set(element, attributes) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value == null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") Object.entries(value).forEach(([name, text]) => element.style.setProperty(name, text));
    else element.setAttribute(key, value === true ? "" : value);
  }
}

/** Puts `children` in the place of what `element` holds. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child != null && child !== false));
}

const locale = () => document.documentElement.lang;

export const count = (value) => Math.round(value).toLocaleString(locale());

/** 1,234 → 1.2K; in Chinese 万 and 亿. */
export const short = (value) =>
  new Intl.NumberFormat(locale(), { notation: "compact", maximumFractionDigits: value < 1000 ? 0 : 1 }).format(value);

export const percent = (share, digits = 0) =>
  new Intl.NumberFormat(locale(), { style: "percent", maximumFractionDigits: digits }).format(share);

export function bytes(value) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (value < 1024 || unit === "GiB") return `${value.toLocaleString(locale(), { maximumFractionDigits: value < 10 ? 1 : 0 })} ${unit}`;
    value /= 1024;
  }
}

/** A duration: 8 ms, 1.2 s, 3 min, 2.5 h. */
export function duration(seconds) {
  const unit = (value, name, digits) =>
    new Intl.NumberFormat(locale(), { style: "unit", unit: name, unitDisplay: "short", maximumFractionDigits: digits }).format(value);
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 1) return unit(seconds * 1000, "millisecond", 0);
  if (seconds < 120) return unit(seconds, "second", seconds < 10 ? 1 : 0);
  if (seconds < 7200) return unit(seconds / 60, "minute", 0);
  if (seconds < 172800) return unit(seconds / 3600, "hour", 1);
  return unit(seconds / 86400, "day", 1);
}

/** "5 min ago" for seconds since 1970. */
export function ago(time) {
  const seconds = Date.now() / 1000 - time;
  const relative = new Intl.RelativeTimeFormat(locale(), { numeric: "auto", style: "short" });
  if (seconds < 60) return relative.format(-Math.max(0, Math.round(seconds)), "second");
  if (seconds < 3600) return relative.format(-Math.round(seconds / 60), "minute");
  if (seconds < 172800) return relative.format(-Math.round(seconds / 3600), "hour");
  return relative.format(-Math.round(seconds / 86400), "day");
}
