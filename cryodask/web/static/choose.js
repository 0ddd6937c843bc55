// Choose classes or exposures by eye: click, shift and click, a box around several, or the keyboard; ratings, tags and notes of exposures.
import { attempt, element, follow, get, post, toast } from "./common.js";
import { Kept, Queue, refresher } from "./edits.js";
import { byRow, fits } from "./remarks.js";

const PER_PAGE = 120;
const $ = (id) => document.getElementById(id);
const grid = $("choices"), { kind } = grid.dataset, mayEdit = grid.dataset.edits === "yes";
const name = kind === "classes" ? "keep" : "leave_out";
let items = [], served = new Map(), values = new Map(), of = "", frozen = null, used = true, page = 0, last = -1, focused = 0, about = -1;
const done = [];

const key = (row, what) => `${row} ${what}`;
const sent = new Map();
const queue = new Queue(new Kept(`${kind} ${location.pathname.replace(/[^/]*$/, "")}`), (ops) => post(`choices/${kind}/ops`, { ops }), {
  changed: apply,
  refused: (what) => {
    toast(what, true);
    pull();
  },
  stored: (ops) => {
    for (const op of ops) sent.set(op.id, op);
    pull();
  },
});

const pull = refresher(async () => {
  const before = [...sent.keys()], now = await get(`choices/${kind}?of=${encodeURIComponent($("of")?.value || "")}`);
  for (const id of before) sent.delete(id);
  ({ items, of, frozen, used } = now);
  served = byRow(now.values);
  queue.seen(now.highest);
}, { failed: (error) => { queue.trouble = error.message; }, changed: apply });

function apply() {
  values = new Map(served);
  for (const op of [...sent.values(), ...queue.pending()]) {
    if ((op.of || "") !== of) continue;
    if (op.do === "set") values.set(key(op.row, op.name), { value: op.value, who: "" });
    else values.delete(key(op.row, op.name));
  }
  draw();
}

const chosen = (row) => values.get(key(row, name));
const edit = (row, what, value) => ({ do: value === null ? "unset" : "set", row, name: what, ...(value === null ? {} : { value }), ...(of ? { of } : {}) });

function act(edits) {
  if (!mayEdit || !edits.length) return;
  done.push(edits.map((one) => edit(one.row, one.name, values.get(key(one.row, one.name))?.value ?? null)));
  queue.add(edits);
}

function choose(rows, on) {
  act(rows.filter((row) => Boolean(chosen(row)) !== on).map((row) => edit(row, name, on ? $("reason").value : null)));
}

const sifted = () => items.filter((item) => fits(values, item.row, item.name, $("filter")?.value || ""));

// --- drawing ---------------------------------------------------------------------------------------------------------------------
function shown() {
  return sifted().slice(page * PER_PAGE, (page + 1) * PER_PAGE);
}

function draw() {
  const all = sifted(), pages = Math.max(1, Math.ceil(all.length / PER_PAGE));
  page = Math.min(page, pages - 1);
  const rows = shown(), old = new Map([...grid.querySelectorAll(".choice")].map((cell) => [+cell.dataset.row, cell]));
  focused = Math.min(focused, Math.max(0, rows.length - 1));
  const cells = rows.map((item, at) => {
    const cell = old.get(item.row) || element("button", { class: "choice", type: "button", "data-row": item.row }, element("b", { text: item.name }), element("span", { class: "faint figures" }), element("span", { class: "said" }));
    const tags = tagsOf(item.row), rating = values.get(key(item.row, "rating"))?.value, picked = chosen(item.row);
    // what is not committed has no picture: asking for it would only fail
    if (item.picture && !cell.querySelector("img")) cell.prepend(element("img", { alt: "", loading: "lazy", width: 128, height: 128, src: item.picture }));
    cell.querySelector(".figures").textContent = item.about;
    cell.querySelector(".said").textContent = [picked?.value, rating && "★".repeat(+rating), tags.join(", "), values.has(key(item.row, "note")) && "note"].filter(Boolean).join(" · ");
    cell.setAttribute("aria-pressed", String(Boolean(picked)));
    cell.tabIndex = at === focused ? 0 : -1;
    return cell;
  });
  // cells that stay are not taken out and put back: that would take the focus away
  for (const cell of old.values()) if (!cells.includes(cell)) cell.remove();
  cells.forEach((cell, at) => {
    if (grid.children[at] !== cell) grid.insertBefore(cell, grid.children[at] || null);
  });
  const count = items.filter((item) => chosen(item.row)).length, waiting = queue.pending().length;
  const say = (id, text) => {
    if ($(id).textContent !== text) $(id).textContent = text;
  };
  say("count", kind === "classes" ? `${count} of ${items.length} classes kept` : `${count} of ${items.length} exposures excluded`);
  say("saved", waiting ? `${waiting} not saved yet. ${queue.trouble}` : queue.trouble);
  say("where", all.length ? `${page * PER_PAGE + 1} to ${page * PER_PAGE + rows.length} of ${all.length}` : "none");
  const by = frozen ? `Runs use the choice of ${frozen.count} that ${frozen.who} froze on ${new Date(frozen.time * 1000).toLocaleString()}.` : "No run uses this choice before somebody says so.";
  const step = kind === "classes" ? "select_classes without keep" : "select_exposures";
  say("frozen", items.length ? (used ? by : `${by} The pipeline has no step ${step}: add one.`) : `There are no ${kind} yet.`);
  $("use").disabled = waiting > 0 || !items.length || (kind === "classes" && !count);
  $("undo").disabled = !done.length;
  $("back").disabled = page === 0;
  $("on").disabled = page >= pages - 1;
}

// --- ratings, tags and notes -------------------------------------------------------------------------------------------------------
let filled = {};
const tagsOf = (row) => [...values.keys()].filter((one) => one.startsWith(`${row} tag:`)).map((one) => one.slice(one.indexOf("tag:") + 4));

function describe(row) {
  if (!$("a-name")) return;
  about = row;
  $("a-name").textContent = row < 0 ? "The session" : items.find((item) => item.row === row)?.name || "";
  filled = { rating: values.get(key(row, "rating"))?.value || "", note: values.get(key(row, "note"))?.value || "", tags: tagsOf(row).join(", ") };
  for (const [what, value] of Object.entries(filled)) $(`a-${what}`).value = value;
}

/** Only what was changed in the form: somebody else may have changed the rest meanwhile. */
function saveAbout() {
  const edits = [];
  for (const what of ["rating", "note"]) {
    const value = $(`a-${what}`).value.trim();
    if (value !== filled[what]) edits.push(edit(about, what, value || null));
  }
  if ($("a-tags").value !== filled.tags) {
    const tags = new Set($("a-tags").value.split(",").map((tag) => tag.trim().slice(0, 40)).filter(Boolean)), before = tagsOf(about);
    for (const tag of tags) if (!before.includes(tag)) edits.push(edit(about, `tag:${tag}`, ""));
    for (const tag of before) if (!tags.has(tag)) edits.push(edit(about, `tag:${tag}`, null));
  }
  act(edits);
  describe(about);
}

// --- mouse and keys --------------------------------------------------------------------------------------------------------------
const cellAt = (event) => event.target.closest?.(".choice");

function clicked(row, range) {
  const rows = sifted().map((item) => item.row), at = rows.indexOf(row), from = rows.indexOf(last);
  if (range && from >= 0) choose(rows.slice(Math.min(at, from), Math.max(at, from) + 1), Boolean(chosen(last)));
  else choose([row], !chosen(row));
  last = row;
  describe(row);
}

let band = null, banded = false;
grid.addEventListener("pointerdown", (event) => {
  if (event.button || event.pointerType === "touch") return;
  const { left, top } = grid.getBoundingClientRect();
  band = { x: event.clientX - left, y: event.clientY - top, box: null };
});
addEventListener("pointermove", (event) => {
  if (!band) return;
  const { left, top } = grid.getBoundingClientRect(), [x, y] = [event.clientX - left, event.clientY - top];
  if (!band.box && Math.hypot(x - band.x, y - band.y) < 8) return;
  band.box ||= grid.appendChild(element("div", { class: "band" }));
  Object.assign(band.box.style, { left: `${Math.min(x, band.x)}px`, top: `${Math.min(y, band.y)}px`, width: `${Math.abs(x - band.x)}px`, height: `${Math.abs(y - band.y)}px` });
});
addEventListener("pointerup", (event) => {
  const box = band?.box;
  band = null;
  if (!box) return;
  const drawn = box.getBoundingClientRect();
  box.remove();
  const rows = [...grid.querySelectorAll(".choice")].filter((cell) => {
    const { left, right, top, bottom } = cell.getBoundingClientRect();
    return left < drawn.right && right > drawn.left && top < drawn.bottom && bottom > drawn.top;
  }).map((cell) => +cell.dataset.row);
  choose(rows, !event.altKey);
  // the click that ends a box chooses nothing more
  banded = true;
  setTimeout(() => (banded = false));
});
grid.addEventListener("click", (event) => {
  const cell = cellAt(event);
  if (!cell || banded) return;
  focused = [...grid.querySelectorAll(".choice")].indexOf(cell);
  clicked(+cell.dataset.row, event.shiftKey);
});
grid.addEventListener("keydown", (event) => {
  const cells = [...grid.querySelectorAll(".choice")], columns = cells.filter((cell) => cell.offsetTop === cells[0].offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (step) {
    focused = Math.min(cells.length - 1, Math.max(0, focused + step));
    draw();
    cells[focused].focus();
    describe(+cells[focused].dataset.row);
  } else if (kind === "exposures" && "12345".includes(event.key)) {
    const row = +cells[focused].dataset.row;
    act([edit(row, "rating", event.key)]);
    describe(row);
  } else return;
  event.preventDefault();
});
$("undo").addEventListener("click", () => queue.add(done.pop()));
$("use").addEventListener("click", () => attempt(async () => {
  const { who } = await post(`choices/${kind}/freeze`, { of });
  toast(`The next run uses this choice, frozen by ${who}.`);
  await pull();
}));
$("bar").addEventListener("submit", (event) => event.preventDefault());
for (const [id, step] of [["back", -1], ["on", 1]]) {
  $(id).addEventListener("click", () => {
    page += step;
    draw();
  });
}
$("filter")?.addEventListener("input", draw);
$("of")?.addEventListener("input", () => {
  done.length = 0;
  for (const cell of grid.querySelectorAll(".choice")) cell.remove();
  pull();
});
$("a-save")?.addEventListener("click", saveAbout);
$("a-session")?.addEventListener("click", () => describe(-1));

pull().then(() => {
  describe(-1);
  follow(`edits/${kind}/events`, { edits: pull });
  queue.flush();
  document.body.dataset.ready = "yes";
});
// for tests
window.choices = { queue, sent, chosen: () => items.filter((item) => chosen(item.row)).map((item) => item.row), busy: pull.busy };
