// Forms about people and tokens.
import { attempt, post, root } from "./common.js";

const on = (selector, kind, handle) => {
  for (const found of document.querySelectorAll(selector)) {
    found.addEventListener(kind, (event) => {
      event.preventDefault();
      attempt(() => handle(found, new FormData(found.tagName === "FORM" ? found : undefined)));
    });
  }
};
const change = async (...request) => {
  await post(...request);
  location.reload();
};

on("[data-revoke]", "click", (button) => change(`${root}api/v1/tokens/${button.dataset.revoke}`, {}, "DELETE"));
on("[data-remove]", "click", (button) => change(`${root}api/v1/people/${encodeURIComponent(button.dataset.remove)}`, {}, "DELETE"));
on("[data-leave]", "click", (button) => change("people", { name: button.dataset.leave, role: null }));
on("#member", "submit", (form, values) => change("people", { name: values.get("name"), role: values.get("role") }));
on("#person", "submit", (form, values) => change(`${root}api/v1/people/${encodeURIComponent(values.get("name"))}`, {
  admin: values.has("admin"),
  microscopes: values.getAll("microscopes"),
  sessions: values.get("session") ? { [values.get("session")]: values.get("role") } : {},
}, "PUT"));
on("#new-token", "submit", async (form, values) => {
  const made = await post(`${root}api/v1/tokens`, { about: values.get("about"), scopes: values.getAll("scopes"), days: Number(values.get("days")) });
  const told = document.getElementById("token");
  told.textContent = `Copy it now, it is not shown again: ${made.token}`;
  told.classList.remove("hidden");
});
