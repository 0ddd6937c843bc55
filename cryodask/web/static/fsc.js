// FSC curves in one plot.
import { colour } from "./common.js";

/** `curves`: label -> { frequency, values } and, if its meaning has a colour, its ink; all on the frequencies of the first. Returns the plot. */
export function drawFsc(place, curves) {
  const axis = { stroke: colour("faint"), grid: { stroke: colour("line") }, ticks: { stroke: colour("line") } };
  const inks = [colour("dot"), colour("second"), colour("faint"), colour("good"), colour("warn"), colour("bad")];
  const tables = curves.map(({ frequency, values }) => {
    // the shell of frequency zero has no resolution
    const kept = frequency.map((f, i) => [f, values[i]]).filter(([f]) => f !== null && f > 0).sort((a, b) => a[0] - b[0]);
    return [kept.map(([f]) => f), kept.map(([, v]) => v)];
  });
  const data = uPlot.join(tables);
  const threshold = { draw: [(u) => {
    const y = u.valToPos(0.143, "y", true);
    u.ctx.save();
    u.ctx.strokeStyle = colour("ink");
    u.ctx.setLineDash([5, 5]);
    u.ctx.beginPath();
    u.ctx.moveTo(u.bbox.left, y);
    u.ctx.lineTo(u.bbox.left + u.bbox.width, y);
    u.ctx.stroke();
    u.ctx.restore();
  }] };
  return new uPlot({
    width: place.clientWidth || 380,
    height: 240,
    scales: { x: { time: false }, y: { range: [-0.1, 1.05] } },
    axes: [axis, axis],
    series: [{ label: "1/Å" }, ...curves.map(({ label, ink }, i) => ({ label, stroke: ink ? colour(ink) : inks[i % inks.length], width: 1.6, spanGaps: true }))],
    hooks: threshold,
  }, data, place);
}
