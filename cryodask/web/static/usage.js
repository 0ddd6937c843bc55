// Usage of the clusters over time: threads in use by lane or by user, one band on top of the other.
import { attempt, colour, element, get, number, root } from "./common.js";

const MOST = 5, HEIGHT = 260;
const $ = (id) => document.getElementById(id);
let plot = null;

/**
 * Threads in use, as a mean over each step of time: `{ times, bands: [{ label, values }] }`. `rows` have `from`, `seconds`,
 * `task_seconds` and a key; the smallest keys beyond five are one band, `others`.
 */
export function bands(rows, key, first, last, step) {
  const start = Math.floor(first / step) * step, count = Math.max(1, Math.ceil((last - start) / step));
  const totals = new Map();
  for (const row of rows) totals.set(row[key], (totals.get(row[key]) ?? 0) + row.task_seconds);
  const labels = [...totals.keys()].sort((a, b) => totals.get(b) - totals.get(a));
  const shown = labels.length > MOST + 1 ? [...labels.slice(0, MOST), "others"] : labels;
  const found = new Map(shown.map((label) => [label, new Array(count).fill(0)]));
  for (const row of rows) {
    const values = found.get(row[key]) ?? found.get("others");
    // a whole day, in steps of an hour, is spread over its hours
    const parts = Math.max(1, Math.round(row.seconds / step));
    for (let part = 0; part < parts; part++) {
      const at = Math.floor((row.from - start) / step) + part;
      if (at >= 0 && at < count) values[at] += row.task_seconds / parts / step;
    }
  }
  return { times: Array.from({ length: count }, (_, n) => start + n * step), bands: [...found].map(([label, values]) => ({ label: label || "none", values })) };
}

/** Times of the axis: hours, with the day where one begins, or days. */
function stamps(splits, step) {
  return splits.map((seconds) => {
    const when = new Date(seconds * 1000), day = `${when.getFullYear()}-${two(when.getMonth() + 1)}-${two(when.getDate())}`;
    return step >= 86400 || (!when.getHours() && !when.getMinutes()) ? day : `${two(when.getHours())}:${two(when.getMinutes())}`;
  });
}

/** Three digits, however small: an hour of a few tasks is not nothing. */
const figure = (value) => (value === undefined ? "" : number(+value.toPrecision(3)));

const two = (value) => String(value).padStart(2, "0");

function draw({ times, bands: found }, step) {
  plot?.destroy();
  const inks = ["dot", "second", "good", "warn", "bad", "faint"].map(colour), axis = { stroke: colour("faint"), grid: { stroke: colour("line") }, ticks: { stroke: colour("line") } };
  // bands are drawn from the top one down, each filled to the bottom, so that every one is seen above those below it
  const sums = [];
  for (const { values } of found) sums.push(values.map((value, n) => value + (sums.length ? sums[sums.length - 1][n] : 0)));
  // a step is drawn up to the next time: the last one ends now
  const ends = [...times, times[times.length - 1] + step], upTo = (values) => [...values, values[values.length - 1]];
  const order = found.map((_, n) => n).reverse();
  plot = new uPlot({
    width: $("history").clientWidth || 600,
    height: HEIGHT,
    scales: { y: { range: (u, low, high) => [0, (high || 1) * 1.05] } },
    axes: [{ ...axis, space: 90, values: (u, splits) => stamps(splits, step) }, { ...axis, label: "threads in use", labelSize: 20, stroke: colour("faint"), size: (u, texts) => 18 + 7.5 * Math.max(3, ...(texts ?? []).map((text) => text.length)), values: (u, splits) => splits.map(number) }],
    series: [{ label: "from", value: (u, at) => (at === null ? "" : new Date(at * 1000).toLocaleString()) }, ...order.map((n) => ({ label: found[n].label, stroke: inks[n], fill: inks[n], width: 1, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false }, value: (u, _, __, at) => at === null ? "" : figure(found[n].values[at]) }))],
  }, [ends, ...order.map((n) => upTo(sums[n]))], $("history"));
}

/** The same figures as a table, for those who cannot see the plot. */
function list({ times, bands: found }) {
  const hours = times.length > 1 ? (times[1] - times[0]) / 3600 : 1;
  const lines = found.map(({ label, values }) => [label, figure(values.reduce((a, b) => a + b, 0) * hours), figure(Math.max(...values))]);
  const head = element("tr", {}, ...["", "Thread hours", "Most threads"].map((text) => element("th", { scope: "col", class: text ? "n" : "", text })));
  const rows = lines.map(([label, ...values]) => element("tr", {}, element("th", { scope: "row", text: label }), ...values.map((text) => element("td", { class: "n", text }))));
  $("history-table").replaceChildren(element("table", {}, element("caption", { class: "sr", text: "Usage in this time" }), element("thead", {}, head), element("tbody", {}, ...rows)));
}

export async function showHistory() {
  const hours = Number($("history-hours").value), answer = await attempt(() => get(`${root}api/v1/usage/history?hours=${hours}`));
  if (!answer) return;
  const answers = Object.values(answer), rows = answers.flatMap((found) => (Array.isArray(found) ? found : [])), now = Date.now() / 1000;
  const problem = answers.find((found) => !Array.isArray(found))?.problem ?? "";
  if (rows.length) $("history-section").classList.remove("hidden");
  $("history-told").textContent = rows.length ? "" : problem || "Nothing was used in this time.";
  if (!rows.length) {
    plot?.destroy();
    plot = null;
    $("history-table").replaceChildren();
    return;
  }
  const step = hours > 100 ? 86400 : 3600, found = bands(rows, $("history-by").value, now - hours * 3600, now, step);
  draw(found, step);
  list(found);
}

if ($("history-hours")) {
  for (const id of ["history-hours", "history-by"]) $(id).addEventListener("change", showHistory);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showHistory);
  new ResizeObserver(() => {
    const width = $("history").clientWidth;
    if (plot && width && Math.abs(plot.width - width) > 1) plot.setSize({ width, height: HEIGHT });
  }).observe($("history"));
}
