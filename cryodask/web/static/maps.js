// The page of maps.
import { attempt, colour, element, get } from "./common.js";
import { drawFsc } from "./fsc.js";
import { SCALE, Surface } from "./surface.js";

const $ = (id) => document.getElementById(id);
// the same names and colours as in the report
const FSC = { fsc_unmasked: ["unmasked", "faint"], fsc_masked: ["masked", "dot"], fsc_randomised: ["masked, random phases", "bad"], fsc_corrected: ["corrected", "ink"] };
let plot = null;

if ($("step")) {
  const surface = new Surface($("surface"));
  const at = () => `map/${encodeURIComponent($("step").value)}`;
  const drawSection = (axis) => { $(`section-${axis}`).src = `${at()}/section.png?axis=${axis}&at=${$(`at-${axis}`).value}`; };
  const drawSurface = async () => drawScale(await attempt(() => surface.load(`${at()}/surface?sigmas=${$("sigmas").value}`)));

  const load = async () => {
    const found = await attempt(() => get(at()));
    if (!found) return;
    $("to-mask").classList.toggle("hidden", !found.mask);
    $("to-mask").href = `mask?step=${encodeURIComponent(found.step)}`;
    $("about").textContent = `${found.shape.join(" x ")} voxels`;
    $("figures").tBodies[0].replaceChildren(...Object.entries(found.figures).map(([name, text]) =>
      element("tr", {}, element("th", { scope: "row", text: name }), element("td", { class: "n", text }))));
    plot?.destroy();
    plot = null;
    $("no-fsc").classList.toggle("hidden", Boolean(found.fsc));
    if (found.fsc) {
      const { frequency, ...curves } = found.fsc;
      plot = drawFsc($("fsc"), Object.entries(curves).map(([name, values]) => ({ label: FSC[name][0], ink: FSC[name][1], frequency, values })));
    }
    for (const axis of [0, 1, 2]) drawSection(axis);
    drawSurface();
    drawViews(await attempt(() => get(`${at()}/orientations`)));
  };

  $("step").addEventListener("change", load);
  $("sigmas").addEventListener("input", () => { $("sigmas-text").textContent = $("sigmas").value; });
  $("sigmas").addEventListener("change", drawSurface);
  for (const axis of [0, 1, 2]) $(`at-${axis}`).addEventListener("input", () => drawSection(axis));
  load();
}

/** What the colours of a surface mean, if they mean anything. */
function drawScale(head) {
  $("scale").classList.toggle("hidden", !head?.label);
  if (!head?.label) return;
  $("scale-bar").style.background = `linear-gradient(to right, ${SCALE.map((c) => `rgb(${c.join(" ")})`).join(", ")})`;
  const middle = (head.low + head.high) / 2;
  for (const [name, value] of [["low", head.low], ["middle", middle], ["high", head.high]]) $(`scale-${name}`).textContent = value.toFixed(1);
  $("scale-label").textContent = head.label;
}

/** Particles by tilt (down) and rot (across); every field is drawn with the share of the sphere that it covers in mind. */
function drawViews(found) {
  const canvas = $("views"), context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  const seen = Boolean(found?.counts);
  canvas.classList.toggle("hidden", !seen);
  $("views-text").textContent = seen ? `${found.particles.toLocaleString("en")} particles: rot from -180 to 180 degrees across, tilt from 0 to 180 degrees down; density on the sphere.` : "This step has no orientations.";
  if (!seen) return;
  const { counts } = found, rows = counts.length, across = counts[0].length;
  const density = counts.map((row, i) => row.map((n) => n / Math.sin(((i + 0.5) / rows) * Math.PI)));
  const most = Math.max(...density.flat()) || 1, w = canvas.width / across, h = canvas.height / rows;
  context.fillStyle = colour("dot");
  density.forEach((row, i) => row.forEach((n, k) => {
    context.globalAlpha = 0.06 + 0.94 * Math.sqrt(n / most);
    context.fillRect(k * w, i * h, Math.ceil(w), Math.ceil(h));
  }));
  context.globalAlpha = 1;
}
