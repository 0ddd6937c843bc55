// The page of particles: two columns as a density, three ranges, and the step that keeps what is within them.
import { ask, attempt, colour, get } from "./common.js";
import { binned, extent, together, unpack, within } from "./density.js";
import { axes, bgr, fillFrame, frame, placeAt } from "./plane.js";

const $ = (id) => document.getElementById(id);
const ROWS = [0, 1, 2], CELL = 2;
let about = {}, values = {}, stamp = "", size = 0, asked = 0, box = null, drag = null, masks = [null, null, null];
const canvas = $("density");

const title = (name) => `${about[name].title}${about[name].unit ? ` (${about[name].unit})` : ""}`;
const limit = (id) => ($(id).value === "" || !Number.isFinite(+$(id).value) ? null : +$(id).value);
const range = (n) => [limit(`from-${n}`), limit(`to-${n}`)];
const chosen = () => ROWS.map((n) => $(`column-${n}`).value).filter(Boolean);

/** Ask for the columns that are not here yet. If the particles have changed meanwhile, all are asked for again. */
async function load(names) {
  const missing = [...new Set(names)].filter((name) => !values[name]);
  if (!missing.length) return;
  const step = $("step").value, mine = asked;
  const answer = await ask(`particles/columns?step=${encodeURIComponent(step)}&names=${missing.join(",")}`);
  const { head, arrays } = unpack(await answer.arrayBuffer());
  if (mine !== asked) return;
  if (stamp && head.stamp !== stamp) values = {};
  stamp = head.stamp;
  size = head.rows;
  missing.forEach((name, n) => { values[name] = arrays[n]; });
  await load(names);
}

/** Another step, or the same one again. */
async function start() {
  asked++;
  const mine = asked;
  document.body.dataset.ready = "no";
  const found = await get(`particles.json?step=${encodeURIComponent($("step").value)}`);
  if (mine !== asked) return;
  about = Object.fromEntries(found.columns.map((column) => [column.name, column]));
  values = {};
  stamp = "";
  $("empty").classList.toggle("hidden", found.columns.length > 0);
  $("plots").classList.toggle("hidden", !found.columns.length);
  $("count").textContent = "";
  if (found.columns.length) {
    const [x, y = x] = found.first;
    fill($("x"), x);
    fill($("y"), y);
    ROWS.forEach((n) => fill($(`column-${n}`), [x, found.first[1]][n] || "", true));
    await draw();
  }
  document.body.dataset.ready = "yes";
}

/** List the columns; what was chosen before stays if it is among them. */
function fill(select, first, none = false) {
  const before = select.value;
  select.replaceChildren(...(none ? [new Option("none", "")] : []), ...Object.keys(about).map((name) => new Option(title(name), name)));
  select.value = about[before] ? before : first;
}

async function draw() {
  const [x, y] = [$("x").value, $("y").value];
  await load([x, y, ...chosen()]);
  if (!values[x] || !values[y]) return;
  $("count").textContent = `${size.toLocaleString("en")} particles`;
  $("about").textContent = [...new Set([x, y, ...chosen()])].map((name) => `${title(name)}: ${about[name].about}.`).join(" ");
  sift();
}

/** Count what is within the ranges, and draw. */
function sift() {
  ROWS.forEach((n) => {
    const name = $(`column-${n}`).value, limits = range(n), limited = name && (limits[0] !== null || limits[1] !== null);
    // a million particles: only the range that has changed is counted again
    const same = masks[n] && masks[n].of === values[name] && String(masks[n].limits) === String(limits);
    const found = !limited || !values[name] ? null : same ? masks[n] : { ...within(values[name], limits), of: values[name], limits };
    masks[n] = found;
    $(`within-${n}`).textContent = found ? found.count.toLocaleString("en") : "";
  });
  const { keep, count } = together(size, masks.filter(Boolean).map((mask) => mask.inside));
  $("kept").textContent = `${count.toLocaleString("en")} of ${size.toLocaleString("en")}`;
  paint(keep);
}

function paint(keep) {
  const [x, y] = [$("x").value, $("y").value], context = canvas.getContext("2d");
  const limits = [extent(values[x]), extent(values[y])];
  context.clearRect(0, 0, canvas.width, canvas.height);
  box = null;
  if (!limits[0] || !limits[1]) {
    $("density-text").textContent = "No particle has a value in both columns.";
    return;
  }
  box = frame(canvas, ...limits);
  const across = Math.floor(box.w / CELL), down = Math.floor(box.h / CELL);
  const { all, kept, outside } = binned(values[x], values[y], keep, ...limits, across, down);
  const most = Math.log1p(all.reduce((a, b) => Math.max(a, b), 1));
  const ink = bgr(colour("dot")), grey = bgr(colour("faint"));
  const picture = context.createImageData(across, down), pixels = new Uint32Array(picture.data.buffer);
  for (let i = 0; i < all.length; i++) {
    if (!all[i]) continue;
    const alpha = 40 + 215 * (Math.log1p(kept[i] || all[i]) / most) * (kept[i] ? 1 : 0.6);
    pixels[i] = ((alpha << 24) | (kept[i] ? ink : grey)) >>> 0;
  }
  fillFrame(context, box, picture);
  axes(canvas, box, title(x), title(y));
  canvas.setAttribute("aria-label", `Density of the particles: ${title(x)} across, ${title(y)} up`);
  $("density-text").textContent = outside ? `${outside.toLocaleString("en")} particle${outside === 1 ? " is" : "s are"} outside the picture, or without a value.` : "";
}

canvas?.addEventListener("pointerdown", (event) => {
  if (!box) return;
  drag = placeAt(canvas, box, event);
  canvas.setPointerCapture(event.pointerId);
});
canvas?.addEventListener("pointerup", (event) => {
  if (!drag || !box) return;
  const end = placeAt(canvas, box, event), start = drag;
  drag = null;
  if (Math.abs(end[0] - start[0]) < (box.x[1] - box.x[0]) / 100 && Math.abs(end[1] - start[1]) < (box.y[1] - box.y[0]) / 100) return;
  [$("x").value, $("y").value].forEach((name, n) => {
    const row = ROWS.find((one) => $(`column-${one}`).value === name) ?? n;
    const [low, high] = [start[n], end[n]].sort((a, b) => a - b);
    $(`column-${row}`).value = name;
    $(`from-${row}`).value = +low.toPrecision(4);
    $(`to-${row}`).value = +high.toPrecision(4);
  });
  sift();
});

/** The ranges as a `select` step: names and numbers only, which need no quoting. */
function asStep() {
  const limits = ROWS.flatMap((n) => {
    const name = $(`column-${n}`).value, [low, high] = range(n);
    return name ? [low !== null && `${name} >= ${low}`, high !== null && `${name} <= ${high}`].filter(Boolean) : [];
  });
  if (!limits.length) throw new Error("Set a range first.");
  return `- select:\n    from: {particles: ${JSON.stringify($("step").value)}}\n    where: "${limits.join(" and ")}"\n`;
}

if ($("step")) {
  $("step").addEventListener("change", () => attempt(start));
  $("again").addEventListener("click", () => attempt(start));
  for (const id of ["x", "y", ...ROWS.map((n) => `column-${n}`)]) $(id).addEventListener("change", () => attempt(draw));
  for (const id of ROWS.flatMap((n) => [`from-${n}`, `to-${n}`])) $(id).addEventListener("change", () => attempt(draw));
  $("clear").addEventListener("click", () => {
    for (const n of ROWS) $(`from-${n}`).value = $(`to-${n}`).value = "";
    attempt(draw);
  });
  $("as-step").addEventListener("click", () => attempt(() => {
    $("yaml").textContent = asStep();
    $("yaml").classList.remove("hidden");
  }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => attempt(draw));
  attempt(start);
}
