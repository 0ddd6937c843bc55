// What every page uses: addresses, requests, messages, changes as they happen. Plain ES modules; nothing is fetched from another host.

/** The address of the root of the server, relative to this page; pages work behind any prefix. */
export const root = document.body.dataset.root;

/** A short message at the corner of the page; errors stay longer. */
export function toast(text, bad = false) {
  const told = document.createElement("div");
  told.className = bad ? "toast bad" : "toast";
  told.textContent = text;
  document.getElementById("toasts").append(told);
  setTimeout(() => told.remove(), bad ? 9000 : 4000);
}

/** An error that the server explained. */
export class Refused extends Error {
  constructor(status, what) {
    super(what);
    this.status = status;
  }
}

/** Ask the server; errors are thrown with the server's own words. */
export async function ask(address, options = {}) {
  let answer;
  try {
    answer = await fetch(address, { headers: { accept: "application/json", ...options.headers }, ...options });
  } catch {
    throw new Refused(0, "The server cannot be reached at the moment.");
  }
  if (answer.ok) return answer;
  let what = `The server answered ${answer.status}.`;
  try {
    const told = await answer.json();
    what = [told.what, told.way_out].filter(Boolean).join(" ") || what;
  } catch { /* not JSON: a proxy answered */ }
  throw new Refused(answer.status, what);
}

/** JSON from the server. */
export const get = async (address) => (await ask(address)).json();

/** Send a change as JSON; the browser adds where it comes from, which the server checks. */
export async function post(address, body = {}, method = "POST") {
  const headers = { accept: "application/json", "content-type": "application/json" };
  const answer = await ask(address, { method, headers, body: JSON.stringify(body) });
  return (answer.headers.get("content-type") || "").includes("json") ? answer.json() : null;
}

/** Run something a person asked for, and show what went wrong if it fails. */
export async function attempt(what) {
  try {
    return await what();
  } catch (error) {
    toast(error.message, true);
    return undefined;
  }
}

let outside = null;

/** Whether the server has forgotten this browser, as after a night; the page says so for as long as it is true. */
async function loggedOut() {
  try {
    const answer = await fetch(location.href, { headers: { accept: "text/html" }, redirect: "manual" });
    welcome(answer.type === "opaqueredirect");
  } catch { /* the server does not answer: nobody knows */ }
  return outside !== null;
}

function welcome(out) {
  if (!out) outside?.remove();
  if (!out) outside = null;
  else if (!outside) {
    outside = element("div", { class: "toast bad" }, "You are logged out. What you see may be old; no edit is lost. ", element("a", { href: location.href, text: "Log in again" }));
    document.getElementById("toasts").append(outside);
  }
}

/** Call `handlers[kind](data)` for the events of a stream; one stream per page, closed while the page is hidden. */
export function follow(address, handlers) {
  let source = null;
  const open = () => {
    if (source || document.hidden) return;
    source = new EventSource(address);
    for (const [kind, handle] of Object.entries(handlers)) source.addEventListener(kind, (event) => handle(JSON.parse(event.data)));
    source.onopen = () => welcome(false);
    source.onerror = async () => {
      // a browser gives up for good after an answer that is not a stream, such as that of a proxy whose server restarts
      if (source?.readyState !== EventSource.CLOSED) return;
      source = null;
      setTimeout(open, (await loggedOut()) ? 10000 : 2000);
    };
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      source?.close();
      source = null;
    } else open();
  });
  open();
}

/** A colour of the sheet, for canvases. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** An element with attributes (`class`, `text`, `on...`) and children. Text is never read as HTML. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** A number for people: four digits, nothing for what is missing. */
export const number = (value) => (value === null || value === undefined || Number.isNaN(value) ? "–" : String(+(+value).toPrecision(4)));
