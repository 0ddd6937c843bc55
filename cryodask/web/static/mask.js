// Choose the mask of a map: its numbers, and what is drawn into it on sections. What is kept are the edits; the server computes the mask.
import { ask, attempt, follow, get, number, post, toast } from "./common.js";
import { Kept, Queue, refresher } from "./edits.js";
import { boundary } from "./contour.js";
import { Surface } from "./surface.js";

const $ = (id) => document.getElementById(id);
const NAMES = ["lowpass_angstrom", "extend_angstrom", "edge_angstrom"], MOST_POINTS = 200;
const AXES = ["z", "y", "x"], ACROSS = [2, 2, 1], UP = [1, 0, 0];

function start() {
  const mayEdit = $("bar").dataset.edits === "yes", surface = new Surface($("surface")), done = [];
  let now = null, mask = null, size = 0, mark = [0, 0, 0], trail = null;
  const at = () => `mask/${encodeURIComponent($("step").value)}`;

  // --- edits -----------------------------------------------------------------------------------------------------------------------
  const queue = new Queue(new Kept(`masks ${location.pathname.replace(/[^/]*$/, "")}`), (ops) => post("mask/ops", { ops }), {
    changed: say,
    refused: (what) => {
      toast(what, true);
      pull();
    },
    stored: () => pull(),
  });
  const pull = refresher(async () => {
    const found = await get(at());
    queue.seen(found.highest);
    const buffer = await (await ask(`${at()}/volume`)).arrayBuffer(), length = new DataView(buffer).getUint32(0, true);
    const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    // numbers and picture change together
    [now, mask, size] = [{ ...found, share: head.share }, new Uint8Array(buffer, 4 + length), head.size];
    fill();
    await surface.load(`${at()}/surface`, true);
  }, {
    failed: (error) => { queue.trouble = error.message; },
    changed: () => {
      say();
      for (const axis of [0, 1, 2]) drawOver(axis);
    },
  });

  function act(edits, back) {
    if (!mayEdit || !now || !edits.length) return;
    const ops = queue.add(edits.map((edit) => ({ ...edit, row: 0, of: now.of })));
    done.push(back || ops.map((op) => ({ do: "remove", drawn: op.id })));
    say();
  }
  const set = (name, value) => act([{ do: "set", name, value }], [{ do: "set", name, value: now.recipe[name] }]);

  // --- controls --------------------------------------------------------------------------------------------------------------------
  function fill() {
    const { recipe, map } = now, kind = typeof recipe.threshold === "number" ? "number" : recipe.threshold;
    $("t-kind").value = kind;
    $("threshold").max = map.highest;
    $("threshold").step = map.highest / 500;
    $("threshold").value = kind === "number" ? recipe.threshold : map.auto;
    for (const name of NAMES) if (document.activeElement !== $(name)) $(name).value = recipe[name];
    $("lowpass-text").textContent = map.shown_lowpass_angstrom > recipe.lowpass_angstrom + 0.01 ? `shown at ${number(map.shown_lowpass_angstrom)} Å` : "";
    $("radius").value ||= Math.round(0.06 * map.voxels * map.pixel_size_angstrom) || 1;
    for (const axis of [0, 1, 2]) $(`at-${axis}`).step = 1 / (map.voxels - 1);
  }

  function say() {
    if (!now) return;
    const { recipe, map, frozen } = now, waiting = queue.pending().length, drawn = recipe.strokes.length;
    const put = (id, text) => {
      if ($(id).textContent !== text) $(id).textContent = text;
    };
    put("threshold-text", number(+$("threshold").value));
    put("strokes", drawn === 1 ? "1 stroke is drawn." : `${drawn} strokes are drawn.`);
    put("share", mask ? `The mask fills ${(100 * now.share).toFixed(1)} % of ${map.voxels} x ${map.voxels} x ${map.voxels} voxels.` : "");
    put("saved", waiting ? `${waiting} not saved yet. ${queue.trouble}` : queue.trouble);
    const by = frozen ? `Runs use the mask that ${frozen.who} froze on ${new Date(frozen.time * 1000).toLocaleString()}${frozen.current ? "" : "; it was edited since"}.` : "No run uses this mask before somebody says so.";
    put("frozen", now.used ? by : `${by} The pipeline has no step draw_mask that takes it: add one.`);
    $("undo").disabled = !done.length;
    $("use").disabled = waiting > 0 || pull.busy() || !(now.share > 0);
    $("clear").disabled = !drawn || !mayEdit;
    $("former").classList.toggle("hidden", !now.former || now.edited || !mayEdit);
    for (const control of [$("t-kind"), $("threshold"), ...NAMES.map($)]) control.disabled = !mayEdit || (control.id === "threshold" && $("t-kind").value === "none");
  }

  // --- sections --------------------------------------------------------------------------------------------------------------------
  const last = () => now.map.voxels - 1;
  const index = (axis) => Math.round($(`at-${axis}`).value * last());
  /** Angstrom from the centre of the map, and back. */
  const angstrom = (voxel) => (voxel - Math.floor(now.map.voxels / 2)) * now.map.pixel_size_angstrom;
  const voxel = (place) => place / now.map.pixel_size_angstrom + Math.floor(now.map.voxels / 2);

  function drawSection(axis) {
    if (!now) return;
    $(`section-${axis}`).src = `map/${encodeURIComponent($("step").value)}/section.png?axis=${axis}&at=${index(axis) / last()}`;
    drawOver(axis);
  }

  function drawOver(axis) {
    const canvas = $(`over-${axis}`), context = canvas.getContext("2d"), { width, height } = canvas;
    context.clearRect(0, 0, width, height);
    if (!mask || !now) return;
    const ratio = now.map.voxels / size, here = Math.min(size - 1, Math.round(index(axis) / ratio)), stride = [size * size, size, 1];
    const value = (row, column) => mask[here * stride[axis] + row * stride[UP[axis]] + column * stride[ACROSS[axis]]];
    // the middle of a voxel of the map is half a pixel of its picture from the border
    const scale = width / now.map.voxels, x = (column) => (column + 0.5) * scale, y = (row) => height - (row + 0.5) * scale;
    context.lineWidth = 3;
    context.strokeStyle = "#ffb000";
    context.beginPath();
    for (const [[r0, c0], [r1, c1]] of boundary(value, size, 127.5)) {
      context.moveTo(x(c0 * ratio), y(r0 * ratio));
      context.lineTo(x(c1 * ratio), y(r1 * ratio));
    }
    context.stroke();
    const radius = ($("radius").value / now.map.pixel_size_angstrom) * scale;
    if (trail?.axis === axis) {
      context.strokeStyle = erasing() ? "#ff6a5eaa" : "#58d68daa";
      context.lineWidth = 2 * radius;
      context.lineCap = context.lineJoin = "round";
      context.beginPath();
      trail.points.forEach((place, i) => context[i ? "lineTo" : "moveTo"](x(voxel(place[ACROSS[axis]])), y(voxel(place[UP[axis]]))));
      context.lineTo(x(voxel(trail.points.at(-1)[ACROSS[axis]])) + 0.01, y(voxel(trail.points.at(-1)[UP[axis]])));
      context.stroke();
    }
    if (document.activeElement === canvas) {
      context.lineWidth = 2;
      context.strokeStyle = "#ffffff";
      context.beginPath();
      context.arc(x(voxel(mark[ACROSS[axis]])), y(voxel(mark[UP[axis]])), Math.max(3, radius), 0, 7);
      context.stroke();
    }
  }

  const erasing = () => document.querySelector("[name=tool]:checked").value === "erase";
  const stroke = (points, erase) => ({ do: "draw", stroke: { points, radius_angstrom: +$("radius").value || 1, erase } });

  /** The place under the pointer: in the section, so its third number is that of the section. */
  function placeAt(axis, event) {
    const { left, bottom, width } = $(`over-${axis}`).getBoundingClientRect(), place = [0, 0, 0], scale = width / now.map.voxels;
    place[axis] = angstrom(index(axis));
    place[ACROSS[axis]] = angstrom((event.clientX - left) / scale - 0.5);
    place[UP[axis]] = angstrom((bottom - event.clientY) / scale - 0.5);
    return place.map((one) => Math.round(one * 100) / 100);
  }

  for (const axis of [0, 1, 2]) {
    const canvas = $(`over-${axis}`);
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button || !now || !mayEdit) return;
      canvas.setPointerCapture(event.pointerId);
      trail = { axis, points: [placeAt(axis, event)] };
      mark = trail.points[0];
      drawOver(axis);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (trail?.axis !== axis || trail.points.length >= MOST_POINTS) return;
      const place = placeAt(axis, event), before = trail.points.at(-1);
      if (Math.hypot(...place.map((one, i) => one - before[i])) < $("radius").value / 4) return;
      trail.points.push(place);
      drawOver(axis);
    });
    canvas.addEventListener("pointerup", () => {
      if (trail?.axis !== axis) return;
      act([stroke(trail.points, erasing())]);
      trail = null;
    });
    canvas.addEventListener("pointercancel", () => {
      trail = null;
      drawOver(axis);
    });
    for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, () => drawOver(axis));
    canvas.addEventListener("keydown", (event) => {
      if (!now) return;
      const step = Math.max(now.map.pixel_size_angstrom, $("radius").value / 2), turn = { PageUp: 1, PageDown: -1 }[event.key];
      const move = { ArrowLeft: [ACROSS[axis], -1], ArrowRight: [ACROSS[axis], 1], ArrowUp: [UP[axis], 1], ArrowDown: [UP[axis], -1] }[event.key];
      if (move) mark[move[0]] = Math.min(angstrom(last()), Math.max(angstrom(0), mark[move[0]] + move[1] * step));
      else if (turn) {
        $(`at-${axis}`).value = (index(axis) + turn * Math.max(1, Math.round(step / now.map.pixel_size_angstrom))) / last();
        drawSection(axis);
      } else if (event.key === "Enter" || event.key === " ") act([stroke([placed(axis)], false)]);
      else if (event.key === "Delete" || event.key === "Backspace") act([stroke([placed(axis)], true)]);
      else return;
      event.preventDefault();
      $("mark").textContent = `Mark at ${placed(axis).map((one, i) => `${AXES[i]} ${one.toFixed(0)}`).join(", ")} Å from the centre.`;
      drawOver(axis);
    });
    $(`at-${axis}`).addEventListener("input", () => drawSection(axis));
  }
  function placed(axis) {
    const place = [...mark];
    place[axis] = angstrom(index(axis));
    return place;
  }

  // --- everything else ---------------------------------------------------------------------------------------------------------------
  $("threshold").addEventListener("input", () => {
    $("t-kind").value = "number";
    say();
  });
  $("threshold").addEventListener("change", () => set("threshold", +$("threshold").value));
  $("t-kind").addEventListener("change", () => set("threshold", $("t-kind").value === "number" ? +$("threshold").value : $("t-kind").value));
  for (const name of NAMES) $(name).addEventListener("change", () => {
    if ($(name).checkValidity() && $(name).value) set(name, +$(name).value);
    else $(name).value = now.recipe[name];
  });
  $("radius").addEventListener("input", () => [0, 1, 2].forEach(drawOver));
  $("undo").addEventListener("click", () => {
    queue.add(done.pop().map((edit) => ({ ...edit, row: 0, of: now.of })));
    say();
  });
  $("clear").addEventListener("click", () => act(now.drawn.map((drawn) => ({ do: "remove", drawn })), now.drawn.map((drawn) => ({ do: "restore", drawn }))));
  $("former").addEventListener("click", () => {
    const { strokes, ...numbers } = now.former;
    act([...Object.entries(numbers).map(([name, value]) => ({ do: "set", name, value })), ...strokes.map((one) => ({ do: "draw", stroke: one }))], []);
    done.pop();
  });
  $("use").addEventListener("click", () => attempt(async () => {
    const { who } = await post("mask/freeze", { of: now.of });
    toast(`The next run uses this mask, frozen by ${who}.`);
    await pull();
  }));
  $("bar").addEventListener("submit", (event) => event.preventDefault());
  const drawMap = () => attempt(() => surface.load(`${at()}/surface?of=map&sigmas=${$("sigmas").value}`));
  $("sigmas").addEventListener("input", () => { $("sigmas-text").textContent = $("sigmas").value; });
  $("sigmas").addEventListener("change", drawMap);
  async function open() {
    done.length = 0;
    await pull();
    for (const axis of [0, 1, 2]) drawSection(axis);
    await drawMap();
  }
  $("step").addEventListener("change", open);
  open().then(() => {
    follow("edits/masks/events", { edits: pull });
    queue.flush();
    document.body.dataset.ready = "yes";
  });
  // for tests
  window.chosen = { queue, recipe: () => now?.recipe, share: () => now?.share, busy: pull.busy };
}

if ($("step")) start();
