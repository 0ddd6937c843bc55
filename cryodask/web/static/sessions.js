// The list of sessions: its filter, and the form for a new one, whose numbers are those that the chosen template asks for.
import { attempt, post } from "./common.js";
import { byRow, fits } from "./remarks.js";

const filter = document.getElementById("filter"), form = document.getElementById("new");

filter?.addEventListener("input", () => {
  for (const table of document.querySelectorAll("table[data-sessions]")) {
    for (const row of table.tBodies[0].rows) {
      const values = byRow(JSON.parse(row.dataset.remarks));
      row.classList.toggle("hidden", !fits(values, -1, `${row.dataset.name} ${table.dataset.sessions}`, filter.value));
    }
  }
});

form?.elements.template.addEventListener("change", () => {
  for (const numbers of form.querySelectorAll("fieldset")) {
    numbers.disabled = numbers.dataset.of !== form.elements.template.value;
    numbers.classList.toggle("hidden", numbers.disabled);
  }
});
form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { name, microscope, template, ...values } = Object.fromEntries(new FormData(form));
  const made = await attempt(() => post("s", { name, microscope, template, values }));
  if (made) location.assign(`s/${encodeURIComponent(made.id)}/`);
});
