// Edits the picks of one micrograph on a canvas. It knows no addresses: a `source` gives pictures and picks, and takes edits.
import { blurredArea, boxWidths, cut, greys, paint, quantised, sigmaOf, spread } from "./pixels.js";
import { Kept, Queue } from "./edits.js";

const CONTROLS = `
<div class="picker">
<canvas class="view" tabindex="0" role="application" aria-roledescription="micrograph"></canvas>
<form class="controls">
<p class="count" role="status"></p>
<label>Low-pass <output></output><input name="lowpass" type="range" min="0" max="80" step="1"></label>
<label>Contrast <output></output><input name="contrast" type="range" min="0.3" max="6" step="0.05"></label>
<label>Brightness <output></output><input name="brightness" type="range" min="-1" max="1" step="0.02"></label>
<label>Diameter <output></output><input name="diameter" type="range" min="20" max="600" step="2"></label>
<label>Score above <output></output><input name="score" type="range"></label>
<div class="buttons"><button type="button" name="below" class="second">Remove below</button><button type="button" name="above" class="second">Add above</button></div>
<div class="buttons"><label><input name="removed" type="checkbox"> show removed</label><label><input name="inverted" type="checkbox"> invert</label></div>
<div class="buttons"><button type="button" name="undo" class="second">Undo</button><button type="button" name="redo" class="second">Redo</button><button type="button" name="closer" class="second" aria-label="Zoom in">+</button><button type="button" name="farther" class="second" aria-label="Zoom out">&minus;</button><button type="button" name="fit" class="second">Fit</button></div>
<p class="saved" role="status"></p>
<button type="button" name="freeze">Use these picks</button>
<p class="frozen"></p>
</form>
</div>`;

const LABEL = "Micrograph. Arrow keys move the cursor, Enter adds or removes a pick, M takes one up and puts it down, plus and minus zoom, 0 shows all, Z undoes, Y redoes.";

// share of what is seen that is filtered beyond each of its edges, so that small movements cost nothing
const MARGIN = 1 / 8;

/** Where a place in the micrograph (pixels, rows upwards, whole numbers at pixel centres) is on the canvas, and back. */
export class Frame {
  constructor(height, width) {
    Object.assign(this, { height, width, zoom: 1, left: 0, top: 0 });
  }

  toScreen(y, x) {
    return [this.left + (x + 0.5) * this.zoom, this.top + (this.height - (y + 0.5)) * this.zoom];
  }

  toPlace(right, down) {
    return [this.height - (down - this.top) / this.zoom - 0.5, (right - this.left) / this.zoom - 0.5];
  }

  /** The pixels of a picture that are on a canvas, and some more around them; a pixel of the picture is a block of `step` pixels. */
  area(canvas, picture, step, margin) {
    const [above, before] = this.toPlace(0, 0), [below, after] = this.toPlace(canvas.width, canvas.height);
    const range = (from, to, length) => {
      const [low, high] = [(from + 0.5) / step, (to + 0.5) / step], more = margin * (high - low);
      const first = Math.min(Math.max(Math.floor(low - more), 0), length - 1);
      return [first, Math.min(Math.max(Math.ceil(high + more), first + 1), length) - first];
    };
    const [bottom, height] = range(below, above, picture.height), [left, width] = range(before, after, picture.width);
    return { bottom, left, height, width };
  }

  fit(canvas) {
    this.zoom = Math.min(canvas.width / this.width, canvas.height / this.height);
    this.left = (canvas.width - this.width * this.zoom) / 2;
    this.top = (canvas.height - this.height * this.zoom) / 2;
  }

  zoomAt(right, down, factor) {
    const zoom = Math.min(24, Math.max(0.02, this.zoom * factor));
    this.left = right - ((right - this.left) * zoom) / this.zoom;
    this.top = down - ((down - this.top) * zoom) / this.zoom;
    this.zoom = zoom;
  }
}

export class Picker {
  constructor(place, source, { edits = true, kept = new Kept() } = {}) {
    this.source = source;
    this.edits = edits;
    place.innerHTML = CONTROLS;
    this.root = place.querySelector(".picker");
    this.canvas = this.root.querySelector("canvas");
    this.canvas.setAttribute("aria-label", LABEL);
    this.form = this.root.querySelector("form").elements;
    this.context = this.canvas.getContext("2d");
    this.picks = new Map();
    this.served = [];
    this.levels = new Map();
    this.sent = new Map();
    this.done = [];
    this.undone = [];
    this.cursor = { y: 0, x: 0 };
    this.held = null;
    this.spent = {};
    this.queue = new Queue(kept, (ops) => source.send(ops), {
      changed: () => this.apply(),
      refused: (what) => this.refuse(what),
      stored: (ops) => {
        for (const op of ops) this.sent.set(op.id, op);
        this.refresh();
      },
    });
    this.listen();
  }

  /** Show the exposure; resolves when its first picture is on the screen. */
  async open() {
    const info = await this.source.picks();
    [this.height, this.width] = info.shape;
    Object.assign(this, { row: info.row, pixel: info.pixel_size_angstrom, steps: info.steps });
    this.frame = new Frame(this.height, this.width);
    this.cursor = { y: Math.floor(this.height / 2), x: Math.floor(this.width / 2) };
    this.settings(info);
    this.take(info);
    this.resize();
    this.frame.fit(this.canvas);
    await this.see(this.steps.at(-1));
    this.spent.first = performance.now();
    this.source.onChange(() => this.refresh());
    addEventListener("online", () => this.queue.flush());
    this.queue.flush();
    this.draw();
  }

  settings(info) {
    const scores = info.picks.map((pick) => pick[3]).filter((score) => score !== null);
    const [low, high] = [Math.min(...scores, 0), Math.max(...scores, 1)];
    Object.assign(this.form.score, { min: low, max: high, step: "any" });
    let known = {};
    try {
      known = JSON.parse(localStorage.getItem("picker settings")) || {};
    } catch { /* the defaults then */ }
    const values = { lowpass: 20, contrast: 1.6, brightness: 0, ...known, diameter: info.diameter_angstrom };
    for (const [name, value] of Object.entries(values)) if (this.form[name]) this.form[name].value = value;
    const accepted = info.picks.filter((pick) => pick[4] && pick[3] !== null).map((pick) => pick[3]);
    // a little below, because a slider rounds
    this.form.score.value = accepted.length ? Math.min(...accepted) - 1e-6 * (high - low) : low;
    this.tell();
  }

  // --- picks -------------------------------------------------------------------------------------------------------------------
  take(info) {
    this.served = info.picks;
    this.queue.seen(info.highest);
    this.frozen = info.frozen;
    this.apply();
  }

  async refresh() {
    if (this.refreshing) {
      this.again = true;
      return;
    }
    this.refreshing = true;
    try {
      do {
        this.again = false;
        const before = [...this.sent.keys()];
        const info = await this.source.picks();
        for (const id of before) this.sent.delete(id);
        this.take(info);
      } while (this.again);
    } catch (error) {
      this.queue.trouble = error.message;
      clearTimeout(this.later);
      this.later = setTimeout(() => this.refresh(), 2000);
    } finally {
      this.refreshing = false;
      this.tell();
    }
  }

  /** The picks as the server gave them, with the edits that it does not have yet. */
  apply() {
    const picks = new Map();
    for (const [pick, y, x, score, accepted, removed, who] of this.served) picks.set(pick, { pick, y, x, score, accepted, removed, who });
    // edits that were stored after the picks were asked for: without them a pick would vanish for a moment
    for (const op of [...this.sent.values(), ...this.queue.pending()]) {
      if (op.row !== this.row) continue;
      if (op.do === "add") picks.set(op.id, { pick: op.id, y: op.y, x: op.x, score: null, accepted: true, removed: false, who: "", ...picks.get(op.id) });
      const pick = picks.get(op.pick);
      if (!pick) continue;
      if (op.do === "move") Object.assign(pick, { y: op.y, x: op.x });
      else pick.removed = op.do === "remove";
    }
    this.picks = picks;
    this.draw();
    this.tell();
  }

  shown() {
    return [...this.picks.values()].filter((pick) => pick.accepted && !pick.removed);
  }

  nearest(y, x, reach) {
    let best = null, least = reach;
    for (const pick of this.shown()) {
      const distance = Math.hypot(pick.y - y, pick.x - x);
      if (distance <= least) [best, least] = [pick, distance];
    }
    return best;
  }

  /** Make edits that are undone together. */
  act(edits) {
    if (!this.edits || !edits.length) return;
    const before = edits.map((edit) => ({ ...this.picks.get(edit.pick) }));
    const ops = this.queue.add(edits.map((edit) => ({ row: this.row, ...edit })));
    const back = ops.map((op, i) => inverse(op, before[i]));
    this.done.push({ back: back.reverse(), again: ops.map(repeated) });
    this.undone = [];
    this.tell();
  }

  step(from, to, which) {
    const action = from.pop();
    if (!action) return;
    to.push(action);
    this.queue.add(action[which].map((edit) => ({ row: this.row, ...edit })));
  }

  undo() {
    this.step(this.done, this.undone, "back");
  }

  redo() {
    this.step(this.undone, this.done, "again");
  }

  toggle(y, x) {
    const pick = this.nearest(y, x, this.radius());
    if (pick) this.act([{ do: "remove", pick: pick.pick, y: pick.y, x: pick.x }]);
    else if (this.inside(y, x)) this.act([{ do: "add", y, x }]);
  }

  move(pick, y, x) {
    if (this.inside(y, x)) this.act([{ do: "move", pick: pick.pick, y, x }]);
  }

  inside(y, x) {
    return y >= 0 && x >= 0 && y < this.height && x < this.width;
  }

  radius() {
    return this.form.diameter.value / 2 / this.pixel;
  }

  below() {
    const limit = +this.form.score.value;
    return this.shown().filter((pick) => pick.score !== null && pick.score < limit);
  }

  above() {
    const limit = +this.form.score.value;
    return [...this.picks.values()].filter(
      (pick) => !pick.accepted && pick.score >= limit && !this.shown().some((other) => Math.hypot(other.y - pick.y, other.x - pick.x) < 1.5),
    );
  }

  // --- pictures ----------------------------------------------------------------------------------------------------------------
  /** Show a level of the picture; it is fetched and filtered once. */
  async see(step) {
    if (this.wanted === step) return;
    this.wanted = step;
    if (!this.levels.has(step)) {
      try {
        this.levels.set(step, await this.source.picture(step));
      } catch (error) {
        this.queue.trouble = error.message;
        this.wanted = this.step_;
        this.tell();
        return;
      }
    }
    if (this.wanted !== step) return;
    this.step_ = step;
    this.filter();
  }

  /** The level whose pixels are the largest that are not larger than those of the screen. */
  suitable() {
    const fine = this.steps.filter((step) => step * this.frame.zoom <= 1.01);
    return fine.length ? Math.max(...fine) : this.steps[0];
  }

  /** Filter what is seen of the level, and show it. */
  filter() {
    this.renew();
    this.draw();
  }

  /** Show what is filtered with the contrast and brightness of now. */
  colour() {
    this.tint();
    this.draw();
  }

  renew() {
    const level = this.levels.get(this.step_);
    if (!level) return;
    const begun = performance.now();
    this.area = this.frame.area(this.canvas, level, this.step_, MARGIN);
    const sigma = sigmaOf(+this.form.lowpass.value, this.pixel * this.step_);
    if (sigma > 0.3) {
      const widths = boxWidths(sigma), about = `${widths}`;
      if (level.about !== about) Object.assign(level, { about, spread: spread(level, widths) });
      this.bytes = quantised(blurredArea(level, this.area, widths), level.spread);
    } else this.bytes = cut(level, this.area);
    this.tint();
    this.spent.lowpass = performance.now() - begun;
  }

  tint() {
    if (!this.area) return;
    const begun = performance.now(), { height, width } = this.area;
    if (!this.picture || this.picture.width !== width || this.picture.height !== height) {
      this.picture = document.createElement("canvas");
      Object.assign(this.picture, { width, height });
      this.image = this.picture.getContext("2d").createImageData(width, height);
    }
    const table = greys(+this.form.contrast.value, +this.form.brightness.value, this.form.inverted.checked);
    paint(this.bytes, height, width, table, new Uint32Array(this.image.data.buffer));
    this.picture.getContext("2d").putImageData(this.image, 0, 0);
    this.shownStep = this.step_;
    this.spent.contrast = performance.now() - begun;
  }

  /** Whether all that is on the canvas has been filtered. */
  covers() {
    const { area } = this, now = this.frame.area(this.canvas, this.levels.get(this.shownStep), this.shownStep, 0);
    const within = (first, count, from, of) => first >= from && first + count <= from + of;
    return within(now.bottom, now.height, area.bottom, area.height) && within(now.left, now.width, area.left, area.width);
  }

  resize() {
    const { width, height } = this.canvas.getBoundingClientRect();
    const ratio = devicePixelRatio || 1;
    Object.assign(this.canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  }

  draw() {
    if (this.drawing || !this.frame) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = 0;
      this.paintAll();
      this.see(this.suitable());
    });
  }

  paintAll() {
    const { context, canvas, frame } = this;
    context.fillStyle = "#15191d";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (this.area) {
      if (!this.covers()) this.renew();
      // a level leaves out the rows and columns that do not fill a block: those at the top and at the right
      const { bottom, left: first, height, width } = this.area, step = this.shownStep;
      const [left, top] = frame.toScreen((bottom + height) * step - 0.5, first * step - 0.5);
      context.imageSmoothingEnabled = frame.zoom * step < 3;
      context.drawImage(this.picture, left, top, width * step * frame.zoom, height * step * frame.zoom);
    }
    const radius = Math.max(3, this.radius() * frame.zoom), limit = +this.form.score.value;
    for (const pick of this.picks.values()) {
      const below = pick.score !== null && pick.score < limit;
      if (!this.edits && pick.removed) continue;
      if (pick.removed && pick.accepted) {
        if (this.form.removed.checked) this.mark(pick, radius, "#ff8f87", [2, 5], true);
      } else if (pick.accepted) {
        const held = this.held === pick.pick;
        this.mark(pick, radius, held ? "#ffffff" : pick.score === null ? "#ffd84a" : "#57e06f", below ? [3, 4] : [], false, pick.score === null);
      } else if (!below) this.mark(pick, radius, "#7fc8ff", [1, 4]);
    }
    if (document.activeElement === canvas) this.crosshair(radius);
  }

  mark(pick, radius, colour, dashes, crossed = false, dotted = false) {
    const [right, down] = this.frame.toScreen(pick.y, pick.x), { context } = this;
    if (right < -radius || down < -radius || right > this.canvas.width + radius || down > this.canvas.height + radius) return;
    for (const [style, width] of [["#000a", 3.5], [colour, 1.7]]) {
      context.strokeStyle = style;
      context.lineWidth = width * (devicePixelRatio || 1);
      context.setLineDash(dashes.map((length) => length * (devicePixelRatio || 1)));
      context.beginPath();
      context.arc(right, down, radius, 0, 2 * Math.PI);
      if (crossed) {
        context.moveTo(right - radius, down - radius);
        context.lineTo(right + radius, down + radius);
      }
      context.stroke();
    }
    context.setLineDash([]);
    if (dotted) {
      context.fillStyle = colour;
      context.fillRect(right - 1.5, down - 1.5, 3, 3);
    }
  }

  crosshair(radius) {
    const [right, down] = this.frame.toScreen(this.cursor.y, this.cursor.x), { context } = this;
    for (const [style, width] of [["#000c", 4], ["#7fc8ff", 2]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.beginPath();
      for (const [a, b] of [[-1, 0], [1, 0], [0, -1], [0, 1]]) {
        context.moveTo(right + a * radius * 0.4, down + b * radius * 0.4);
        context.lineTo(right + a * radius * 1.4, down + b * radius * 1.4);
      }
      context.stroke();
    }
  }

  // --- words -------------------------------------------------------------------------------------------------------------------
  tell() {
    const say = (name, text) => {
      const place = this.root.querySelector(`.${name}`);
      if (place.textContent !== text) place.textContent = text;
    };
    const shown = this.shown(), added = shown.filter((pick) => pick.score === null).length;
    const removed = [...this.picks.values()].filter((pick) => pick.accepted && pick.removed).length;
    say("count", `${shown.length} picks, ${added} added by hand, ${removed} removed`);
    const waiting = this.queue.pending().length;
    say("saved", waiting ? `${waiting} edits are not saved yet. ${this.queue.trouble}` : this.queue.trouble || "All edits are saved.");
    const { who, time, used } = this.frozen || {};
    const by = time ? `Runs use the picks as ${who} froze them on ${new Date(time * 1000).toLocaleString()}.` : "No run uses these edits before somebody says so.";
    say("frozen", used === false ? `${by} The pipeline has no step edit_picks without a file: add one after the picker.` : by);
    for (const name of ["lowpass", "contrast", "brightness", "diameter", "score"]) {
      const unit = { lowpass: " Å", diameter: " Å" }[name] || "";
      this.form[name].previousElementSibling.textContent = name === "lowpass" && +this.form[name].value === 0 ? "off" : `${+(+this.form[name].value).toFixed(2)}${unit}`;
    }
    this.form.undo.disabled = !this.done.length;
    this.form.redo.disabled = !this.undone.length;
    for (const name of ["undo", "redo", "below", "above", "freeze"]) this.form[name].hidden = !this.edits;
    this.form.freeze.disabled = waiting > 0;
    this.form.below.textContent = `Remove ${this.below().length} below`;
    this.form.above.textContent = `Add ${this.above().length} above`;
    this.form.below.disabled = !this.below().length;
    this.form.above.disabled = !this.above().length;
  }

  refuse(what) {
    this.root.dispatchEvent(new CustomEvent("refused", { detail: what, bubbles: true }));
    this.refresh();
  }

  // --- mouse and keys ----------------------------------------------------------------------------------------------------------
  listen() {
    const { canvas, form } = this;
    const onSlide = { lowpass: () => this.filter(), contrast: () => this.colour(), brightness: () => this.colour(), inverted: () => this.colour() };
    for (const name of ["lowpass", "contrast", "brightness", "inverted", "diameter", "score", "removed"]) {
      form[name].addEventListener("input", () => {
        (onSlide[name] || (() => this.draw()))();
        this.tell();
        try {
          localStorage.setItem("picker settings", JSON.stringify({ lowpass: form.lowpass.value, contrast: form.contrast.value, brightness: form.brightness.value }));
        } catch { /* the next page begins with the defaults */ }
      });
    }
    const middle = (factor) => this.zoom(canvas.width / 2, canvas.height / 2, factor);
    const buttons = {
      undo: () => this.undo(),
      redo: () => this.redo(),
      closer: () => middle(1.4),
      farther: () => middle(1 / 1.4),
      fit: () => this.all(),
      below: () => this.act(this.below().map((pick) => ({ do: "remove", pick: pick.pick, y: pick.y, x: pick.x }))),
      above: () => this.act(this.above().map((pick) => ({ do: "add", y: pick.y, x: pick.x }))),
      freeze: () => this.freeze(),
    };
    for (const [name, handle] of Object.entries(buttons)) form[name].addEventListener("click", handle);
    this.root.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
    new ResizeObserver(() => {
      if (!this.frame) return;
      const [y, x] = this.frame.toPlace(canvas.width / 2, canvas.height / 2);
      this.resize();
      const [right, down] = this.frame.toScreen(y, x);
      this.frame.left += canvas.width / 2 - right;
      this.frame.top += canvas.height / 2 - down;
      this.paintAll();
    }).observe(canvas);
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(...this.at(event), Math.exp(-event.deltaY * 0.0015));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.drag(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("pointercancel", () => (this.pressed = null));
    canvas.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => this.draw());
  }

  at(event) {
    const { left, top } = this.canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1;
    return [(event.clientX - left) * ratio, (event.clientY - top) * ratio];
  }

  zoom(right, down, factor) {
    this.frame.zoomAt(right, down, factor);
    this.draw();
  }

  all() {
    this.frame.fit(this.canvas);
    this.draw();
  }

  press(event) {
    if (event.button || !this.frame) return;
    this.canvas.setPointerCapture(event.pointerId);
    const from = this.at(event), place = this.frame.toPlace(...from);
    this.pressed = { from, last: from, pick: this.edits ? this.nearest(...place, this.radius()) : null, moved: false };
  }

  drag(event) {
    const pressed = this.pressed;
    if (!pressed) return;
    const here = this.at(event);
    if (Math.hypot(here[0] - pressed.from[0], here[1] - pressed.from[1]) > 4 * (devicePixelRatio || 1)) pressed.moved = true;
    if (!pressed.moved) return;
    if (pressed.pick) [pressed.pick.y, pressed.pick.x] = this.frame.toPlace(...here);
    else {
      this.frame.left += here[0] - pressed.last[0];
      this.frame.top += here[1] - pressed.last[1];
    }
    pressed.last = here;
    this.draw();
  }

  release(event) {
    const pressed = this.pressed;
    this.pressed = null;
    if (!pressed) return;
    const [y, x] = this.frame.toPlace(...this.at(event));
    if (!pressed.moved) {
      this.cursor = { y, x };
      this.toggle(y, x);
    } else if (pressed.pick) {
      this.apply(); // back to where it was, in case the new place is outside
      this.move(pressed.pick, y, x);
    }
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const stride = (event.shiftKey ? 1 : 12) / this.frame.zoom;
    const arrows = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] };
    const keys = {
      Enter: () => this.toggle(this.cursor.y, this.cursor.x),
      " ": () => this.toggle(this.cursor.y, this.cursor.x),
      m: () => this.hold(),
      "+": () => this.zoom(...this.frame.toScreen(this.cursor.y, this.cursor.x), 1.4),
      "=": () => this.zoom(...this.frame.toScreen(this.cursor.y, this.cursor.x), 1.4),
      "-": () => this.zoom(...this.frame.toScreen(this.cursor.y, this.cursor.x), 1 / 1.4),
      0: () => this.all(),
      z: () => this.undo(),
      y: () => this.redo(),
    };
    if (event.key in arrows) {
      const [up, right] = arrows[event.key];
      this.cursor.y = Math.min(this.height - 1, Math.max(0, this.cursor.y + up * stride));
      this.cursor.x = Math.min(this.width - 1, Math.max(0, this.cursor.x + right * stride));
      this.reveal();
    } else if (keys[event.key]) keys[event.key]();
    else return;
    event.preventDefault();
    event.stopPropagation();
    this.draw();
  }

  /** Take up the pick under the cursor, or put the one that is held down there. */
  hold() {
    const held = this.picks.get(this.held);
    if (held) this.move(held, this.cursor.y, this.cursor.x);
    this.held = held ? null : this.nearest(this.cursor.y, this.cursor.x, this.radius())?.pick || null;
  }

  /** Pan until the cursor can be seen. */
  reveal() {
    const [right, down] = this.frame.toScreen(this.cursor.y, this.cursor.x), edge = 20;
    this.frame.left += Math.max(0, edge - right) - Math.max(0, right - this.canvas.width + edge);
    this.frame.top += Math.max(0, edge - down) - Math.max(0, down - this.canvas.height + edge);
  }

  async freeze() {
    try {
      await this.source.freeze();
      await this.refresh();
    } catch (error) {
      this.refuse(error.message);
    }
  }
}

/** The edit that takes an edit back. */
function inverse(op, before) {
  if (op.do === "add") return { do: "remove", pick: op.id, y: op.y, x: op.x };
  if (op.do === "remove") return { do: "restore", pick: op.pick };
  if (op.do === "restore") return { do: "remove", pick: op.pick };
  return { do: "move", pick: op.pick, y: before.y, x: before.x };
}

/** The edit that repeats an edit after it was taken back; an added pick comes back as the same pick. */
function repeated({ id, n, row, ...op }) {
  return op.do === "add" ? { do: "restore", pick: id } : op;
}
