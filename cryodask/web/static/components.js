// The space of components: density of the particles, maps at points and along paths, and regions whose particles are kept as a set.
import { ask, attempt, colour, element, follow, get, number, post, toast } from "./common.js";
import { Kept, Queue, refresher } from "./edits.js";
import { axes, bgr, fillFrame, frame, onCanvas, placeAt } from "./plane.js";
import { Surface } from "./surface.js";

const $ = (id) => document.getElementById(id);
const MOST_CORNERS = 200, CELL = 3;
const many = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
const rounded = (value) => Math.round(value * 1e4) / 1e4;

function start() {
  const canvas = $("plane"), mayEdit = $("bar").dataset.edits === "yes", surface = new Surface($("surface"), true), done = [];
  let now = null, grid = null, box = null, mark = null, trail = null;
  /** The point whose map is shown, and the corners of a path: coordinates along every component. The region is in the plane. */
  let point = [], path = [], corners = [];
  const at = () => `components/${encodeURIComponent($("step").value)}`;
  const tool = () => document.querySelector("[name=tool]:checked").value;
  const x = () => +$("x").value, y = () => +$("y").value;
  const plane = () => (y() ? [x(), y()] : [x()]);
  const put = (id, text) => {
    if ($(id).textContent !== text) $(id).textContent = text;
  };

  // --- edits -----------------------------------------------------------------------------------------------------------------------
  const queue = new Queue(new Kept(`regions ${location.pathname.replace(/[^/]*$/, "")}`), (ops) => post("components/ops", { ops }), {
    changed: say,
    refused: (what) => {
      toast(what, true);
      pull();
    },
    stored: () => pull(),
  });
  const pull = refresher(async () => {
    now = await get(at());
    queue.seen(now.highest);
    // another server or person may have changed the set that is described
    if (!corners.length) tellRegion();
  }, { failed: (error) => { queue.trouble = error.message; }, changed: () => { say(); draw(); } });

  function act(edits, back) {
    if (!mayEdit || !now) return;
    const ops = queue.add(edits.map((edit) => ({ ...edit, row: 0, of: now.of })));
    done.push(back || ops.map((op) => ({ do: "remove", drawn: op.id })));
    say();
  }

  function say() {
    if (!now) return;
    const waiting = queue.pending().length, { frozen, regions } = now;
    $("noise").classList.toggle("hidden", !now.components.some((one) => one.noise));
    const noise = now.components.filter((one) => one.noise).map((one) => one.number);
    put("noise", now.noise ? "The components are noise: the half-sets do not find them independently. Do not interpret these maps, and do not choose particles by them."
      : noise.length ? `Component ${noise.join(", ")} is noise: the half-sets do not find it independently. Do not interpret maps along it.` : "");
    put("says", `${many(now.particles, "particle")}; ${now.says}.`);
    put("chosen", regions.length ? `${many(now.chosen, "particle")} (${percent(now.chosen, now.particles)}) in ${many(regions.length, "region")}.` : "No region is chosen yet.");
    put("saved", waiting ? `${waiting} not saved yet. ${queue.trouble}` : queue.trouble);
    const by = frozen ? `Runs use the set that ${frozen.who} froze on ${new Date(frozen.time * 1000).toLocaleString()}${frozen.current ? "" : "; it was edited since"}.` : "No run uses this set before somebody says so.";
    put("frozen", now.used ? by : `${by} The pipeline has no step select_region without regions: add one.`);
    $("undo").disabled = !done.length;
    $("use").disabled = waiting > 0 || pull.busy() || !now.chosen;
    $("keep").disabled = !mayEdit || !region() || !(counted > 0);
    $("clear").disabled = !corners.length && !path.length;
    const key = JSON.stringify(regions);
    if ($("regions").dataset.key !== key) listRegions(key);
  }

  function listRegions(key) {
    $("regions").dataset.key = key;
    $("regions").replaceChildren(...now.regions.map((one, i) => element("li", {},
      element("span", { text: `${i + 1}: component${one.components.length > 1 ? "s" : ""} ${one.components.join(" and ")}, ${many(one.particles, "particle")}${one.reason ? `, ${one.reason}` : ""}${one.who ? `, by ${one.who}` : ""}` }),
      element("button", { type: "button", class: "plain", text: "Show", "aria-label": `Show region ${i + 1}`, onclick: () => show(one) }),
      ...(mayEdit ? [element("button", { type: "button", class: "plain", text: "Remove", "aria-label": `Remove region ${i + 1}`, onclick: () => act([{ do: "remove", drawn: one.id }], [{ do: "restore", drawn: one.id }]) })] : []))));
  }

  async function show(one) {
    $("x").value = one.components[0];
    $("y").value = one.components[1] || 0;
    await attempt(loadDensity);
    corners = one.components.length > 1 ? one.points.map((p) => [...p]) : one.points.map(([v]) => [v, 0]);
    changedRegion();
  }

  // --- the region ------------------------------------------------------------------------------------------------------------------
  let counted = 0, asked = 0;
  /** What is drawn, as a region; null before it encloses anything. */
  function region() {
    if (!y()) return corners.length === 2 ? { components: [x()], points: corners.map(([v]) => [v]) } : null;
    return corners.length > 2 ? { components: plane(), points: corners } : null;
  }

  async function tellRegion() {
    const one = region(), mine = ++asked, nothing = !one && !now.regions.length;
    const query = one ? `?regions=${encodeURIComponent(JSON.stringify([one]))}` : "";
    const found = nothing ? null : await attempt(() => get(`${at()}/region${query}`));
    if (mine !== asked) return;
    counted = found && one ? found.particles : 0;
    put("h-region", one || nothing ? "Region" : "Particles of the set");
    put("region-text", found ? `${many(found.particles, "particle")}, ${percent(found.particles, found.of)} of all, in ${many(found.in_exposures, "exposure")}.${found.particles ? "" : " Draw it elsewhere, or larger."}` : "Draw a box or a lasso around particles.");
    put("halves", found?.halves ? `Of half-set 1 ${percent(...found.halves[0])}, of half-set 2 ${percent(...found.halves[1])}.` : "");
    const pictured = Boolean(found?.images && found.particles);
    $("images").classList.toggle("hidden", !pictured);
    if (pictured) $("images").src = `${at()}/particles.png${query || `?set=${encodeURIComponent(JSON.stringify(now.regions.map((r) => r.id)))}`}`;
    $("exposures").classList.toggle("hidden", !found?.exposures.length);
    $("exposures").tBodies[0].replaceChildren(...(found?.exposures || []).map(([row, name, inside, all, pictures]) => element("tr", {},
      element("th", { scope: "row" }, pictures ? element("a", { href: `pick/${row}`, text: name }) : name),
      element("td", { class: "n", text: inside.toLocaleString("en") }), element("td", { class: "n", text: all.toLocaleString("en") }), element("td", { class: "n", text: percent(inside, all) }))));
    put("more", found && found.in_exposures > found.exposures.length ? `The ${found.exposures.length} exposures with most of them.` : "");
    document.body.dataset.region = found ? found.particles : "none";
    say();
  }

  function changedRegion() {
    draw();
    say();
    tellRegion();
  }

  // --- the map ---------------------------------------------------------------------------------------------------------------------
  const query = () => `point=${encodeURIComponent(JSON.stringify(point))}`;
  const loadMap = refresher(() => attempt(() => surface.load(`${at()}/surface?${query()}&sigmas=${$("sigmas").value}`)), {
    changed: () => { document.body.dataset.shown = JSON.stringify(point); },
  });
  const drawSection = (axis) => { $(`section-${axis}`).src = `${at()}/section.png?${query()}&axis=${axis}&at=${$(`at-${axis}`).value}`; };

  function showPoint() {
    [...$("point").querySelectorAll("input")].forEach((input, j) => { if (document.activeElement !== input) input.value = point[j]; });
    put("h-map", point.some(Boolean) ? `Map at ${point.map(number).join(", ")}` : "Mean map");
    $("download").href = `${at()}/map.mrc?${query()}`;
    for (const axis of [0, 1, 2]) drawSection(axis);
    loadMap();
    draw();
  }

  /** The points of the series: along the path, at equal distances. */
  function stations() {
    const count = Math.min(40, Math.max(2, +$("steps").value || 10)), lengths = path.slice(1).map((one, i) => Math.hypot(...one.map((v, j) => v - path[i][j])));
    const whole = lengths.reduce((a, b) => a + b, 0);
    return Array.from({ length: count }, (_, n) => {
      let left = (whole * n) / (count - 1), i = 0;
      while (i < lengths.length - 1 && left > lengths[i]) left -= lengths[i++];
      const share = lengths[i] ? Math.min(1, left / lengths[i]) : 0;
      return path[i].map((v, j) => rounded(v + share * (path[i + 1][j] - v)));
    });
  }

  function step() {
    const ready = path.length > 1, some = ready ? stations() : [];
    $("along").disabled = !ready;
    $("along").max = Math.max(1, some.length - 1);
    put("along-text", ready ? `${+$("along").value + 1} of ${some.length}` : "none");
    if (ready) point = some[Math.min(+$("along").value, some.length - 1)];
    showPoint();
    say();
  }

  // --- the plane -------------------------------------------------------------------------------------------------------------------
  async function loadDensity() {
    const size = frame(canvas, [0, 1], [0, 1]);
    const answer = await ask(`${at()}/density?x=${x()}&y=${y()}&across=${Math.floor(size.w / CELL)}&down=${Math.floor(size.h / CELL)}`);
    const buffer = await answer.arrayBuffer(), length = new DataView(buffer).getUint32(0, true);
    const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    const counts = new Uint32Array(buffer, 4 + length, head.across * head.down);
    grid = { ...head, counts, most: counts.reduce((a, b) => Math.max(a, b), 1) };
    box = frame(canvas, head.x, head.y || [0, grid.most]);
    mark = [(box.x[0] + box.x[1]) / 2, (box.y[0] + box.y[1]) / 2];
    corners = [];
    put("plane-text", [head.outside > now.unknown && `${many(head.outside - now.unknown, "particle")} outside the picture.`, now.unknown && `${many(now.unknown, "particle")} without coordinates.`].filter(Boolean).join(" "));
    canvas.setAttribute("aria-label", `Density of the particles: component ${x()} across${y() ? `, component ${y()} up` : ", their number up"}`);
    draw();
  }

  function draw() {
    if (!grid || !now) return;
    const context = canvas.getContext("2d"), { across, down, counts, most } = grid, ink = bgr(colour("dot"));
    context.clearRect(0, 0, canvas.width, canvas.height);
    const rows = y() ? down : 100, picture = context.createImageData(across, rows), pixels = new Uint32Array(picture.data.buffer);
    for (let row = 0; row < rows; row++) for (let column = 0; column < across; column++) {
      const count = counts[(y() ? row : 0) * across + column];
      const alpha = y() ? (count ? 40 + 215 * (Math.log1p(count) / Math.log1p(most)) : 0) : count * rows > most * (rows - row - 1) && count ? 200 : 0;
      pixels[row * across + column] = ((alpha << 24) | ink) >>> 0;
    }
    fillFrame(context, box, picture);
    axes(canvas, box, named(x()), y() ? named(y()) : "Particles");
    for (const one of now.regions) if (String(one.components) === String(plane())) outline(context, one.points, colour("good"), []);
    if (corners.length) outline(context, y() ? corners : corners.map(([v]) => [v]), colour("second"), [6, 4]);
    if (path.length) {
      line(context, path.map(project), colour("ink"), [], false);
      for (const one of path) dot(context, project(one), 4, colour("ink"));
    }
    if (point.length) dot(context, project(point), 6, colour("second"));
    if (document.activeElement === canvas) {
      const [a, b] = onCanvas(box, mark);
      context.strokeStyle = colour("ink");
      context.lineWidth = 2;
      context.strokeRect(a - 6, b - 6, 12, 12);
    }
  }
  const project = (one) => [one[x() - 1], y() ? one[y() - 1] : box.y[0]];
  const named = (j) => `component ${j}${now.components[j - 1]?.noise ? " (noise)" : ""}`;

  function line(context, places, ink, dashes, closed) {
    context.strokeStyle = ink;
    context.lineWidth = 2.5;
    context.setLineDash(dashes);
    context.beginPath();
    places.forEach((place, i) => context[i ? "lineTo" : "moveTo"](...onCanvas(box, place)));
    if (closed) context.closePath();
    context.stroke();
    context.setLineDash([]);
  }
  function outline(context, points, ink, dashes) {
    if (y()) line(context, points, ink, dashes, true);
    else for (const [v] of points) line(context, [[v, box.y[0]], [v, box.y[1]]], ink, dashes, false);
  }
  function dot(context, place, radius, ink) {
    context.fillStyle = ink;
    context.beginPath();
    context.arc(...onCanvas(box, place), radius, 0, 7);
    context.fill();
  }

  /** The place of the plane as a point: the other coordinates stay. */
  function lifted([a, b]) {
    const one = [...point];
    one[x() - 1] = rounded(a);
    if (y()) one[y() - 1] = rounded(b);
    return one;
  }
  const corner = ([a, b]) => [rounded(a), y() ? rounded(b) : 0];
  const boxed = ([a, b], [c, d]) => (y() ? [[a, b], [c, b], [c, d], [a, d]] : [[a, 0], [c, 0]]).map(corner);

  function setPoint(place) {
    path = [];
    point = lifted(place);
    step();
  }
  function addToPath(place) {
    path.push(lifted(place));
    $("along").value = 0;
    if (path.length === 1) point = path[0];
    step();
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button || !box || !now) return;
    const place = placeAt(canvas, box, event);
    mark = place;
    if (tool() === "point") return setPoint(place);
    if (tool() === "path") return addToPath(place);
    canvas.setPointerCapture(event.pointerId);
    trail = { from: place, places: [place] };
    return undefined;
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!trail) return;
    const place = placeAt(canvas, box, event), [a, b] = onCanvas(box, place), [c, d] = onCanvas(box, trail.places.at(-1));
    if (Math.hypot(a - c, b - d) < 4) return;
    trail.places.push(place);
    corners = tool() === "box" || !y() ? boxed(trail.from, place) : trail.places.map(corner);
    draw();
  });
  canvas.addEventListener("pointerup", () => {
    if (!trail) return;
    const drawn = trail.places.length > 1;
    trail = null;
    if (!drawn) corners = [];
    // a long lasso keeps its shape with every other corner
    while (corners.length > MOST_CORNERS) corners = corners.filter((_, i) => i % 2 === 0);
    changedRegion();
  });
  canvas.addEventListener("pointercancel", () => {
    trail = null;
    corners = [];
    changedRegion();
  });
  for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, draw);
  let first = null;
  canvas.addEventListener("keydown", (event) => {
    if (!box || event.ctrlKey || event.metaKey) return;
    const share = event.shiftKey ? 0.005 : 0.025, move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (move) {
      mark = [0, 1].map((i) => {
        const [low, high] = i ? box.y : box.x;
        return Math.min(high, Math.max(low, mark[i] + move[i] * share * (high - low)));
      });
      put("plane-text", `Mark at ${(y() ? mark : mark.slice(0, 1)).map((v) => v.toFixed(2)).join(", ")}.`);
      draw();
    } else if (event.key === "Enter" || event.key === " ") enter();
    else if (event.key === "Backspace" || event.key === "Delete") {
      if (tool() === "path") path.pop();
      else corners.pop();
      first = null;
      step();
      changedRegion();
    } else if (event.key === "Escape") clear();
    else return;
    event.preventDefault();
  });
  function enter() {
    if (tool() === "point") setPoint(mark);
    else if (tool() === "path") addToPath(mark);
    else if (tool() === "lasso" && y()) {
      if (corners.length < MOST_CORNERS) corners.push(corner(mark));
      changedRegion();
    } else if (first) {
      corners = boxed(first, mark);
      first = null;
      changedRegion();
    } else {
      first = [...mark];
      put("plane-text", "First corner set: move to the opposite one and press Enter.");
    }
  }
  function clear() {
    corners = [];
    path = [];
    first = null;
    step();
    changedRegion();
  }

  // --- everything else ---------------------------------------------------------------------------------------------------------------
  function fillControls() {
    const count = now.components.length, options = () => now.components.map((one) => new Option(named(one.number), one.number));
    $("x").replaceChildren(...options());
    $("component").replaceChildren(...options());
    $("y").replaceChildren(...options(), new Option("number of particles", 0));
    $("y").value = count > 1 ? 2 : 0;
    for (const id of ["y-label", "lasso-label"]) $(id).classList.toggle("hidden", count < 2);
    point = now.components.map(() => 0);
    $("point").replaceChildren(...now.components.map((one, j) => element("label", {}, `Component ${one.number} `, element("input", { type: "number", step: 0.1, min: -1000, max: 1000, value: 0, onchange: (event) => {
      if (!event.target.checkValidity() || event.target.value === "") event.target.value = point[j];
      path = [];
      point[j] = +event.target.value;
      step();
    } }))));
  }
  for (const id of ["x", "y"]) $(id).addEventListener("change", () => attempt(async () => {
    if (x() === y()) $("y").value = now.components.find((one) => one.number !== x())?.number || 0;
    await loadDensity();
    changedRegion();
  }));
  $("series").addEventListener("click", () => {
    const j = +$("component").value - 1, { quantiles } = now.components[j];
    path = [quantiles[0], quantiles.at(-1)].map((v) => now.components.map((_, i) => (i === j ? v : 0)));
    $("along").value = 0;
    step();
  });
  $("along").addEventListener("input", step);
  $("steps").addEventListener("change", step);
  $("sigmas").addEventListener("input", () => { $("sigmas-text").textContent = $("sigmas").value; });
  $("sigmas").addEventListener("change", () => {
    surface.fit();
    loadMap();
  });
  for (const axis of [0, 1, 2]) $(`at-${axis}`).addEventListener("input", () => drawSection(axis));
  $("clear").addEventListener("click", clear);
  $("keep").addEventListener("click", () => {
    act([{ do: "draw", region: region(), reason: $("reason").value.trim() }]);
    corners = [];
    changedRegion();
  });
  $("undo").addEventListener("click", () => {
    queue.add(done.pop().map((edit) => ({ ...edit, row: 0, of: now.of })));
    say();
  });
  $("use").addEventListener("click", () => attempt(async () => {
    const { who } = await post("components/freeze", { of: now.of });
    toast(`The next run uses this set, frozen by ${who}.`);
    await pull();
  }));
  $("bar").addEventListener("submit", (event) => event.preventDefault());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  async function open() {
    done.length = 0;
    [path, corners] = [[], []];
    await pull();
    if (!now) return;
    fillControls();
    surface.fit();
    await attempt(loadDensity);
    step();
    await tellRegion();
  }
  $("step").addEventListener("change", open);
  open().then(() => {
    follow("edits/regions/events", { edits: pull });
    queue.flush();
    document.body.dataset.ready = "yes";
  });
  // for tests
  window.chosen = { queue, state: () => now, region, point: () => point, path: () => path, busy: () => pull.busy() || loadMap.busy() };
}

if ($("step")) start();
