// The page on which picks are edited: gives the picker its pictures and picks from the server.
import { ask, follow, get, post, toast } from "./common.js";
import { Kept } from "./edits.js";
import { Picker } from "./picker.js";

const { row, edits } = document.getElementById("pick").dataset;

const source = {
  async picture(step) {
    const answer = await ask(`../picture/${row}/${step}?crc=${this.crc}`);
    const [height, width] = answer.headers.get("X-Shape").split(",").map(Number);
    return { height, width, bytes: new Uint8Array(await answer.arrayBuffer()) };
  },
  async picks() {
    const info = await get(`../picks/${row}`);
    this.crc = info.crc;
    return info;
  },
  send: (ops) => post(`../picks/${ops[0].row}/ops`, { ops }),
  onChange: (handle) => follow("../edits/picks/events", { edits: handle }),
  freeze: async () => {
    const { who } = await post("../picks/freeze");
    toast(`The next run uses these picks, frozen by ${who}.`);
  },
};

const kept = new Kept(`picks ${location.pathname.replace(/[^/]*$/, "")}`);
const picker = new Picker(document.getElementById("pick"), source, { edits: edits === "yes", kept });
document.getElementById("pick").addEventListener("refused", (event) => toast(event.detail, true));
addEventListener("keydown", (event) => {
  if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const link = { n: "after", p: "before" }[event.key];
  if (link) document.getElementById(link)?.click();
});
// for tests and benchmarks
window.picker = picker;
picker.open().then(
  () => {
    picker.canvas.focus({ preventScroll: true });
    document.body.dataset.ready = "yes";
  },
  (error) => toast(error.message, true),
);
