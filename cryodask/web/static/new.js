// The form for a new session: the numbers are those that the chosen template asks for.
import { attempt, post } from "./common.js";

const form = document.getElementById("new");

form.elements.template.addEventListener("change", () => {
  for (const numbers of form.querySelectorAll("fieldset")) {
    numbers.disabled = numbers.dataset.of !== form.elements.template.value;
    numbers.classList.toggle("hidden", numbers.disabled);
  }
});
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { name, microscope, template, ...values } = Object.fromEntries(new FormData(form));
  const made = await attempt(() => post("s", { name, microscope, template, values }));
  if (made) location.assign(`s/${encodeURIComponent(made.id)}/`);
});
