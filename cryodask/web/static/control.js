// Start, pause and end the run of a session; what it does is asked again until it does what was asked.
import { attempt, get, post } from "./common.js";

const $ = (id) => document.getElementById(id);
// milliseconds until it is asked again
const PASSING = { starting: 1000, pausing: 1000, ending: 1000, queued: 10000 };

export class Control {
  constructor() {
    this.timer = 0;
    this.busy = false;
    for (const what of ["start", "pause"]) $(`r-${what}`).addEventListener("click", () => this.ask(what));
    $("r-end").addEventListener("click", () => this.confirm($("r-confirm").classList.contains("hidden")));
    $("r-confirm").addEventListener("submit", async (event) => {
      event.preventDefault();
      if (await this.ask("end", Object.fromEntries(new FormData($("r-confirm"))))) this.confirm(false);
    });
    $("r-confirm").addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      this.confirm(false);
      $("r-end").focus();
    });
    this.look();
  }

  confirm(open) {
    $("r-confirm").classList.toggle("hidden", !open);
    $("r-end").setAttribute("aria-expanded", String(open));
    $("r-confirm").reset();
    if (open) $("r-confirm").querySelector("input").focus();
  }

  async ask(what, body = {}) {
    const now = await attempt(() => post(what, body));
    if (now) this.draw(now);
    return now;
  }

  async look() {
    if (this.busy) return;
    this.busy = true;
    try {
      this.draw(await get("control"));
    } catch { /* the next change of the session asks again */ } finally {
      this.busy = false;
    }
  }

  draw(now) {
    $("control").classList.toggle("hidden", !now.may);
    if ($("r-said").textContent !== now.said) $("r-said").textContent = now.said;
    for (const what of ["start", "pause", "end"]) $(`r-${what}`).disabled = !now[what];
    if (!now.end) this.confirm(false);
    for (const [id, text] of [["r-why", now.why_not], ["r-problem", now.problem]]) {
      $(id).textContent = text;
      $(id).classList.toggle("hidden", !text);
    }
    document.body.dataset.run = now.state;
    clearTimeout(this.timer);
    if (now.state in PASSING && !document.hidden) this.timer = setTimeout(() => this.look(), PASSING[now.state]);
  }
}
