// Exposures as pictures or as a table, filtered and sorted, a page at a time.
import { element, number } from "./common.js";
import { LEFT_OUT, WAITING } from "./columns.js";
import { fits } from "./remarks.js";

const PER_PAGE = 48;
const STATES = ["waiting", "started", "done", "quarantined", "left out"];
const $ = (id) => document.getElementById(id);

export class Gallery {
  chosen = -1;
  /** What people have said about exposures; see remarks.js. */
  remarks = new Map();
  #page = 0;
  #rows = [];

  constructor(columns, trends, onChoose) {
    Object.assign(this, { columns, trends, onChoose });
    for (const id of ["f-name", "f-state", "f-kept", "f-sort", "f-down", "f-view"]) $(id).addEventListener("input", () => { this.#page = 0; this.draw(); });
    $("filter").addEventListener("submit", (event) => event.preventDefault());
    $("back").addEventListener("click", () => this.#turn(-1));
    $("on").addEventListener("click", () => this.#turn(1));
  }

  /** The row before or after the chosen one, in the order shown. */
  neighbour(step) {
    const at = this.#rows.indexOf(this.chosen);
    return this.#rows[Math.min(this.#rows.length - 1, Math.max(0, at + step))] ?? -1;
  }

  draw() {
    this.#offerSorting();
    this.#rows = this.#sifted();
    const pages = Math.max(1, Math.ceil(this.#rows.length / PER_PAGE));
    this.#page = Math.min(this.#page, pages - 1);
    const rows = this.#rows.slice(this.#page * PER_PAGE, (this.#page + 1) * PER_PAGE);
    $("where").textContent = this.#rows.length ? `${this.#page * PER_PAGE + 1} to ${this.#page * PER_PAGE + rows.length} of ${this.#rows.length}` : "none";
    $("back").disabled = this.#page === 0;
    $("on").disabled = this.#page >= pages - 1;
    const table = $("f-view").value === "table";
    $("gallery").classList.toggle("hidden", table);
    $("table").classList.toggle("hidden", !table);
    if (table) this.#drawTable(rows);
    else this.#drawPictures(rows);
  }

  choose(row) {
    this.chosen = row;
    for (const cell of document.querySelectorAll("[data-row]")) cell.setAttribute("aria-pressed", String(Number(cell.dataset.row) === row));
  }

  #turn(step) {
    this.#page += step;
    this.draw();
  }

  #offerSorting() {
    const select = $("f-sort");
    if (select.options.length > 1) return;
    select.append(element("option", { value: "time", text: "time" }), element("option", { value: "name", text: "name" }));
    for (const { name, title } of this.columns.about) select.append(element("option", { value: name, text: title }));
  }

  #sifted() {
    const { columns } = this, name = $("f-name").value, state = $("f-state").value, kept = $("f-kept").checked;
    const rows = [];
    for (let row = 0; row < columns.size; row++) {
      if (columns.state[row] === LEFT_OUT || (state !== "" && columns.state[row] !== Number(state))) continue;
      if (kept && !this.trends.keep[row]) continue;
      if (name && !fits(this.remarks, row, columns.names[row], name)) continue;
      rows.push(row);
    }
    const by = $("f-sort").value, sign = $("f-down").checked ? -1 : 1;
    if (by === "name") rows.sort((a, b) => sign * columns.names[a].localeCompare(columns.names[b], undefined, { numeric: true }));
    else if (by) {
      const values = by === "time" ? columns.time : columns.values[by];
      // exposures without this number come last, whichever way round
      rows.sort((a, b) => (values[a] !== values[a]) - (values[b] !== values[b]) || sign * (values[a] - values[b]) || a - b);
    } else if (sign < 0) rows.reverse();
    return rows;
  }

  #drawPictures(rows) {
    const old = new Map([...$("gallery").children].map((cell) => [Number(cell.dataset.row), cell]));
    $("gallery").replaceChildren(...rows.map((row) => {
      const stamp = `${this.columns.time[row]}.${this.columns.state[row]}.${this.columns.names[row]}`;
      const known = old.get(row);
      return known && known.dataset.stamp === stamp ? known : this.#cell(row, stamp);
    }));
    this.choose(this.chosen);
  }

  #cell(row, stamp) {
    const cell = element("button", { class: "cell", type: "button", "data-row": row, "data-stamp": stamp, onclick: () => this.onChoose(row) });
    const { columns } = this;
    // what is not committed has no picture: asking for it would only fail
    if (columns.state[row] !== WAITING && !Number.isNaN(columns.values.total_motion?.[row] ?? NaN)) {
      cell.append(element("img", { src: `thumbnail/${row}.jpg?${columns.time[row]}`, alt: "", loading: "lazy", width: 120, height: 120 }));
    }
    cell.append(element("span", { text: columns.names[row] }), element("span", { class: columns.state[row] === 3 ? "bad" : "faint", text: STATES[columns.state[row]] }));
    return cell;
  }

  #drawTable(rows) {
    const { columns } = this;
    const head = element("tr", {}, element("th", { scope: "col", text: "Exposure" }), element("th", { scope: "col", text: "State" }));
    for (const { title, unit } of columns.about) head.append(element("th", { scope: "col", class: "n", text: unit ? `${title} (${unit})` : title }));
    const body = element("tbody");
    for (const row of rows) {
      const pick = element("button", { class: "plain", type: "button", "data-row": row, text: columns.names[row], onclick: () => this.onChoose(row) });
      const line = element("tr", {}, element("th", { scope: "row" }, pick), element("td", { text: STATES[columns.state[row]] }));
      for (const { name } of columns.about) line.append(element("td", { class: "n", text: number(columns.values[name][row]) }));
      body.append(line);
    }
    $("table").replaceChildren(element("table", { class: "wide" }, element("thead", {}, head), body));
    this.choose(this.chosen);
  }
}
