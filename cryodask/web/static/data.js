// The page of the data: acknowledging a hand-over, and removing what is due.
import { attempt, post, toast } from "./common.js";

const form = (id, address, said) => {
  const element = document.getElementById(id);
  element?.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = element.querySelector("button");
    button.disabled = true;
    const done = await attempt(() => post(address, Object.fromEntries(new FormData(element))));
    button.disabled = false;
    if (done === undefined) return;
    toast(said(done));
    setTimeout(() => location.reload(), 1200);
  });
};

form("acknowledge", "data/acknowledge", (done) => `Acknowledged by ${done.who}.`);
form("remove", "data/remove", (done) => `${done.size} are being removed.`);
