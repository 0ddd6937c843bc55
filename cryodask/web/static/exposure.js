// One exposure: micrograph with picks, spectrum with fit, trajectories, numbers.
import { attempt, colour, element, get, number } from "./common.js";

const $ = (id) => document.getElementById(id);
let asked = -1, shown = null, fit = null, picture = null;

/** Show an exposure; `diameter` in Angstrom for the circles. */
export async function show(row) {
  asked = row;
  const found = await attempt(() => get(`exposure/${row}`));
  if (!found || asked !== row) return;
  shown = found;
  $("d-name").textContent = found.name;
  $("d-pick").href = `pick/${row}`;
  $("d-pick").classList.toggle("hidden", !found.picks);
  $("d-failure").classList.toggle("hidden", !found.failure);
  if (found.failure) $("d-failure").textContent = `Quarantined in ${found.failure.step}: ${found.failure.message}`;
  $("d-spectrum").classList.toggle("hidden", !found.shape);
  if (found.shape) $("d-spectrum").src = `spectrum/${row}.jpg?${found.time}`;
  $("d-spectrum").alt = `Power spectrum of ${found.name}`;
  picture = null;
  drawMicrograph();
  drawMotion();
  drawFit();
  drawNumbers();
  if (!found.shape) return;
  const image = new Image();
  image.onload = () => {
    if (asked !== row) return;
    picture = image;
    drawMicrograph();
  };
  image.src = `micrograph/${row}.jpg?${found.time}`;
}

$("d-show").addEventListener("change", () => drawMicrograph());

/** Rows of a micrograph run upwards; the picture from the server is turned for the screen already, the picks are turned here. */
function drawMicrograph() {
  const canvas = $("d-micrograph"), context = canvas.getContext("2d");
  const [height, width] = shown.shape || [1, 1];
  canvas.height = Math.round((canvas.width * height) / width);
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (picture) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const picks = shown.picks;
  const count = picks ? picks.accepted.reduce((a, b) => a + b, 0) : 0;
  canvas.setAttribute("aria-label", `Micrograph ${shown.name} with ${count} picks`);
  if (!picks || !$("d-show").checked) return;
  const scale = canvas.width / width, radius = shown.picks.diameter_angstrom && shown.pixel_size_angstrom ? (shown.picks.diameter_angstrom / shown.pixel_size_angstrom / 2) * scale : 9;
  context.strokeStyle = "#4ade80";
  context.lineWidth = 1.6;
  for (let i = 0; i < picks.x.length; i++) {
    if (!picks.accepted[i]) continue;
    context.beginPath();
    context.arc((picks.x[i] + 0.5) * scale, canvas.height - (picks.y[i] + 0.5) * scale, radius, 0, 7);
    context.stroke();
  }
}

/** The track of the whole frame, and the local tracks on their grid, enlarged. */
function drawMotion() {
  const canvas = $("d-motion"), context = canvas.getContext("2d"), side = canvas.width;
  context.clearRect(0, 0, side, side);
  const motion = shown.motion;
  $("d-motion-text").textContent = motion ? "Motion: whole frame (bold), local tracks enlarged" : "No motion yet";
  if (!motion) return;
  const track = motion.frame_shift, reach = Math.max(1e-6, ...track.map(([y, x]) => Math.max(Math.abs(y - track[0][0]), Math.abs(x - track[0][1]))));
  const line = (path, cx, cy, scale, ink, wide) => {
    context.strokeStyle = ink;
    context.lineWidth = wide;
    context.beginPath();
    path.forEach(([y, x], i) => context[i ? "lineTo" : "moveTo"](cx + (x - path[0][1]) * scale, cy - (y - path[0][0]) * scale));
    context.stroke();
  };
  if (motion.patch_shift) {
    const at = motion.patch_position, high = Math.max(...at.map((p) => p[0])) || 1, wide = Math.max(...at.map((p) => p[1])) || 1;
    motion.patch_shift.forEach((path, i) => line(path, 20 + (at[i][1] / wide) * (side - 40), side - 20 - (at[i][0] / high) * (side - 40), 14 / reach, colour("faint"), 1));
  }
  line(track, side / 2, side / 2, (side * 0.42) / reach, colour("dot"), 3);
}

function drawFit() {
  const place = $("d-fit"), curves = shown.spectrum;
  fit?.destroy();
  fit = null;
  if (!curves) return;
  const axis = { stroke: colour("faint"), grid: { stroke: colour("line") }, ticks: { stroke: colour("line") } };
  fit = new uPlot({
    width: place.clientWidth || 360,
    height: 170,
    scales: { x: { time: false }, y: { range: [-0.2, 1.2] } },
    axes: [axis, axis],
    series: [{ label: "1/Å" }, { label: "spectrum", stroke: colour("dot") }, { label: "fit", stroke: colour("second") }],
  }, [curves.spectrum_frequency, curves.spectrum_average, curves.spectrum_fit], place);
}

function drawNumbers() {
  fill("d-numbers", [...shown.numbers.map(({ title, unit, value }) => [title, unit, value]), ["Pixel size", "Å", shown.pixel_size_angstrom]]);
  fill("d-more", shown.metadata.map(({ step, name, unit, value }) => [`${step}: ${name}`, unit === "1" ? "" : unit, value]));
}

function fill(table, lines) {
  $(table).tBodies[0].replaceChildren(...lines.map(([title, unit, value]) =>
    element("tr", {}, element("th", { scope: "row", text: title }), element("td", { class: "n", text: typeof value === "string" ? value : `${number(value)} ${unit || ""}` }))));
}
