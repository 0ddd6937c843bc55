// Trends: one number of all exposures against their number, with a range that is brushed or typed.
import { colour, element, number } from "./common.js";
import { LEFT_OUT } from "./columns.js";

const HEIGHT = 150;

/** Points as pixels of one picture: drawn as arcs, as uPlot does, ten thousand points take seconds without a graphics card. */
function dots(plot, values, keep, scratch) {
  const { left, top, width, height } = plot.bbox;
  const w = Math.round(width), h = Math.round(height);
  if (w < 1 || h < 1) return;
  scratch.width = w;
  scratch.height = h;
  const context = scratch.getContext("2d"), picture = context.createImageData(w, h), pixels = new Uint32Array(picture.data.buffer);
  const inside = pixel(colour("dot")), outside = pixel(colour("faint"), 110);
  const { min: x0, max: x1 } = plot.scales.x, { min: y0, max: y1 } = plot.scales.y;
  const across = (w - 1) / (x1 - x0 || 1), up = (h - 1) / (y1 - y0 || 1), side = Math.round((values.length > 3000 ? 2 : values.length > 300 ? 3 : 5) * devicePixelRatio);
  for (let i = 0; i < values.length; i++) {
    const v = values[i];
    if (v !== v) continue;
    const x = Math.round((i + 1 - x0) * across - side / 2), y = Math.round((y1 - v) * up - side / 2);
    const ink = keep[i] ? inside : outside;
    for (let b = Math.max(0, y); b < Math.min(h, y + side); b++) for (let a = Math.max(0, x); a < Math.min(w, x + side); a++) pixels[b * w + a] = ink;
  }
  context.putImageData(picture, 0, 0);
  plot.ctx.drawImage(scratch, left, top);
}

function pixel(hex, alpha = 255) {
  const value = parseInt(hex.slice(1), 16);
  return ((alpha << 24) | ((value & 255) << 16) | (value & 0xff00) | (value >> 16)) >>> 0;
}

export class Trends {
  ranges = {};
  keep = new Uint8Array(0);
  #plots = {};

  /** `onRange()` after a range changed, `onPoint(row)` when a point was clicked. */
  constructor(place, columns, shown, { onRange, onPoint }) {
    Object.assign(this, { place, columns, shown, onRange, onPoint });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      for (const one of Object.values(this.#plots)) one.plot.destroy();
      this.#plots = {};
      place.replaceChildren();
      this.draw();
    });
    new ResizeObserver(() => {
      for (const { plot, holder } of Object.values(this.#plots)) {
        if (holder.clientWidth && Math.abs(plot.width - holder.clientWidth) > 1) plot.setSize({ width: holder.clientWidth, height: HEIGHT });
      }
    }).observe(place);
  }

  /** Which exposures are within all ranges, and how many. */
  sift() {
    const { size, values, state } = this.columns;
    const keep = new Uint8Array(size);
    let count = 0;
    const limits = Object.entries(this.ranges).map(([name, [low, high]]) => [values[name], low ?? -Infinity, high ?? Infinity]);
    for (let i = 0; i < size; i++) {
      let inside = state[i] !== LEFT_OUT ? 1 : 0;
      for (const [column, low, high] of limits) if (!(column[i] >= low && column[i] <= high)) inside = 0;
      keep[i] = inside;
      count += inside;
    }
    this.keep = keep;
    return count;
  }

  draw() {
    const xs = Float64Array.from({ length: this.columns.size }, (_, i) => i + 1);
    for (const { name, title, unit } of this.columns.about) {
      if (!this.shown.includes(name)) continue;
      this.#plots[name] ??= this.#make(name, unit ? `${title} (${unit})` : title);
      const { plot, low, high } = this.#plots[name];
      const range = this.ranges[name] || [null, null];
      for (const [input, value] of [[low, range[0]], [high, range[1]]]) if (document.activeElement !== input) input.value = value === null ? "" : number(value);
      plot.setData([xs, this.columns.values[name]], true);
    }
  }

  set(name, low, high) {
    if (low === null && high === null) delete this.ranges[name];
    else this.ranges[name] = [low, high];
    this.onRange();
  }

  #make(name, title) {
    const typed = (what) =>
      element("input", { type: "number", step: "any", "aria-label": `${title}: ${what}`, onchange: () => {
        const value = (input) => (input.value === "" ? null : Number(input.value));
        this.set(name, value(low), value(high));
      } });
    const low = typed("from"), high = typed("to"), holder = element("div");
    this.place.append(element("div", { class: "plot" }, element("div", { class: "row" }, element("h3", { text: title }), low, "to", high), holder));
    const scratch = document.createElement("canvas");
    const axis = { stroke: colour("faint"), grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line") }, font: "12px system-ui, sans-serif" };
    const plot = new uPlot({
      width: holder.clientWidth || 360,
      height: HEIGHT,
      legend: { show: false },
      cursor: { drag: { x: false, y: true, setScale: false }, points: { show: false } },
      scales: { x: { time: false, range: (u, low, high) => [low - 0.5, high + 0.5] } },
      axes: [{ ...axis, size: 30 }, { ...axis, size: 50 }],
      series: [{}, { paths: () => null, points: { show: false } }],
      hooks: {
        draw: [(u) => { dots(u, this.columns.values[name] || [], this.keep, scratch); this.#shade(u, name); }],
        setSelect: [(u) => {
          if (u.select.height < 3) return;
          const [a, b] = [u.posToVal(u.select.top + u.select.height, "y"), u.posToVal(u.select.top, "y")];
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          this.set(name, +a.toPrecision(4), +b.toPrecision(4));
        }],
      },
    }, [[], []], holder);
    plot.over.addEventListener("click", () => {
      if (plot.cursor.idx !== null && plot.cursor.idx !== undefined && plot.select.height < 3) this.onPoint(plot.cursor.idx);
    });
    return { plot, low, high, holder };
  }

  /** Grey what is outside the range. */
  #shade(plot, name) {
    const range = this.ranges[name];
    if (!range) return;
    const { left, top, width, height } = plot.bbox, { ctx } = plot;
    const at = (value, none) => (value === null ? none : Math.min(top + height, Math.max(top, plot.valToPos(value, "y", true))));
    const upper = at(range[1], top), lower = at(range[0], top + height);
    ctx.save();
    ctx.fillStyle = "rgba(128, 128, 128, 0.25)";
    ctx.fillRect(left, top, width, upper - top);
    ctx.fillRect(left, lower, width, top + height - lower);
    ctx.restore();
  }
}
