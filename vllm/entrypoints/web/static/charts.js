// Lines over time, drawn by uPlot in the page's colours.

import uPlot from "./uplot/uPlot.esm.js";
import { fill, h } from "./dom.js";

const HEIGHT = 170;
const SHORTEST_S = 300;
const HOUR_S = 3600;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A card with a title, the latest value of each line, and the lines.
 * @param lines [{label, colour: a CSS variable}] @param format a value as text */
export class Chart {
  constructor(title, lines, format) {
    this.lines = lines;
    this.format = format;
    this.values = lines.map(() => h("strong", {}, "–"));
    this.canvas = h("div", { class: "plot", role: "img" });
    this.title = title;
    this.element = h("section", { class: "card chart" },
      h("h2", {}, title),
      h("ul", { class: "legend" }, lines.map((line, i) => h("li", {}, h("span", { class: `swatch line ${line.colour.slice(2)}` }), line.label, this.values[i]))),
      this.canvas);
    this.watcher = new ResizeObserver(() => this.plot?.setSize({ width: this.canvas.clientWidth, height: HEIGHT }));
  }

  /** @param time seconds since 1970 @param columns values of each line, null where there is none */
  draw(time, columns) {
    columns.forEach((column, i) => {
      const last = column.findLast((value) => value !== null);
      this.values[i].textContent = last === undefined ? "–" : this.format(last);
    });
    const said = this.lines.map((line, i) => `${line.label}: ${this.values[i].textContent}`).join(", ");
    this.canvas.setAttribute("aria-label", `${this.title}. ${said}`);
    if (this.plot) this.plot.setData([time, ...columns]);
    else if (this.canvas.clientWidth) this.#make([time, ...columns]);
  }

  #make(data) {
    const grid = { stroke: colour("--line"), width: 1 };
    const axis = { stroke: colour("--faint"), grid, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const options = {
      width: this.canvas.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { show: false },
      scales: { x: { range: timeRange }, y: { range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1] } },
      axes: [
        { ...axis, values: (_, ticks) => ticks.map((s) => new Date(s * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })), space: 70, size: 30 },
        { ...axis, values: (_, ticks) => ticks.map((value) => this.format(value)), size: 58, space: 34 },
      ],
      series: [{}, ...this.lines.map((line) => ({
        label: line.label, stroke: colour(line.colour), width: 1.75, points: { show: false }, spanGaps: true,
        fill: line.filled ? `${colour(line.colour)}22` : undefined,
      }))],
    };
    fill(this.canvas);
    this.plot = new uPlot(options, data, this.canvas);
    this.watcher.observe(this.canvas);
  }

  destroy() {
    this.watcher.disconnect();
    this.plot?.destroy();
  }
}

/** The last hour, or what there is of it. */
function timeRange(_, first, last) {
  const end = last ?? Date.now() / 1000;
  return [Math.min(Math.max(first ?? end, end - HOUR_S), end - SHORTEST_S), end];
}

