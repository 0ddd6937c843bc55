// The page of a session: counters, trends, exposures, quarantine; kept up to date while it is open.
import { attempt, ask, element, follow, get, post, toast } from "./common.js";
import { Columns } from "./columns.js";
import { Control } from "./control.js";
import { refresher } from "./edits.js";
import { show } from "./exposure.js";
import { Gallery } from "./gallery.js";
import { byRow } from "./remarks.js";
import { Trends } from "./trends.js";

const SHOWN = ["defocus", "astigmatism", "ctf_resolution", "total_motion", "early_motion", "picks"];
const $ = (id) => document.getElementById(id);
const columns = new Columns();
const trends = new Trends($("trends"), columns, SHOWN, { onRange: redraw, onPoint: choose });
const gallery = new Gallery(columns, trends, choose);
const control = new Control();
let quarantined = -1, stamp = "";

function redraw() {
  $("c-kept").textContent = trends.sift();
  trends.draw();
  gallery.draw();
}

function choose(row) {
  if (row < 0 || row >= columns.size || !columns.names[row]) return;
  gallery.choose(row);
  stamp = `${columns.time[row]}.${columns.state[row]}`;
  show(row);
}

async function pull() {
  await columns.load();
  redraw();
  const row = gallery.chosen;
  if (row < 0) choose(columns.names.findIndex(Boolean));
  // an exposure that was chosen before it was done gets its picture and numbers when they are there
  else if (stamp !== `${columns.time[row]}.${columns.state[row]}`) choose(row);
  document.body.dataset.sequence = columns.sequence;
  document.body.dataset.epoch = columns.epoch;
}

function count(now) {
  for (const name of ["exposures", "done", "started", "waiting", "quarantined", "picks"]) $(`c-${name}`).textContent = now[name].toLocaleString("en");
  $("problem").classList.toggle("hidden", !now.problem);
  $("problem").textContent = now.problem;
  const { state, step, rate, stall, note, time } = now.run;
  const age = time ? `, ${new Date(time * 1000).toLocaleString()}` : "";
  $("run").textContent = state ? [step ? `${state}: ${step}` : state, rate, note, stall].filter(Boolean).join("; ") + age : "No run has started yet.";
}

async function listQuarantine() {
  const groups = await attempt(() => get("quarantine"));
  if (!groups) return;
  $("quarantine").replaceChildren(...(groups.length ? groups.map(({ step, error, message, exposures }) =>
    element("details", { class: "card" },
      element("summary", { text: `${exposures.length} in ${step}: ${error}: ${message.split("\n")[0]}` }),
      element("pre", { text: message, tabindex: 0 }),
      element("div", { class: "row" }, ...exposures.slice(0, 200).map(({ row, name }) => element("button", { class: "plain", type: "button", text: name, onclick: () => choose(row) })))))
    : [element("p", { class: "faint", text: "Nothing is quarantined." })]));
}

function tellSaved({ person, time }) {
  $("saved").textContent = time ? `Saved by ${person}, ${new Date(time * 1000).toLocaleString()}` : "";
}

$("save").addEventListener("click", () => attempt(async () => {
  tellSaved(await post("thresholds", { ranges: trends.ranges }, "PUT"));
  toast("The ranges are saved for everybody.");
}));
$("clear").addEventListener("click", () => {
  trends.ranges = {};
  redraw();
});
$("step").addEventListener("click", () => attempt(async () => {
  const body = JSON.stringify({ ranges: trends.ranges });
  const answer = await ask("thresholds/step", { method: "POST", body, headers: { "content-type": "application/json" } });
  $("yaml").textContent = await answer.text();
  $("yaml").classList.remove("hidden");
}));
$("f-name").addEventListener("focus", () => attempt(async () => {
  gallery.remarks = byRow((await get("remarks")).values);
  gallery.draw();
}));
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "[" || event.key === "]") choose(gallery.neighbour(event.key === "[" ? -1 : 1));
});

const saved = await attempt(() => get("thresholds"));
if (saved) {
  trends.ranges = saved.ranges;
  tellSaved(saved);
}
await attempt(pull);
const again = refresher(pull);
follow("events", {
  changed: (now) => {
    count(now);
    control.look();
    if (now.quarantined !== quarantined) {
      quarantined = now.quarantined;
      listQuarantine();
    }
    if (now.sequence !== columns.sequence || now.epoch !== columns.epoch) setTimeout(again, Math.random() * now.spread_ms);
  },
});
