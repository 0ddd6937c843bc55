// The state of the clusters: lanes, pools, jobs, usage; asked for again while the page is open.
import { element, get, number, root } from "./common.js";
import { showHistory } from "./usage.js";

const EVERY_MS = 15000;
const $ = (id) => document.getElementById(id);

function table(title, heads, lines) {
  if (!lines.length) return "";
  const head = element("tr", {}, ...heads.map(([text, kind]) => element("th", { scope: "col", class: kind || "", text })));
  const rows = lines.map((line) => element("tr", {}, ...line.map((value, i) => element(i ? "td" : "th", { scope: i ? false : "row", class: heads[i][1] || "", text: value ?? "" }))));
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title }, element("h3", { text: title }), element("table", { class: "wide" }, element("thead", {}, head), element("tbody", {}, ...rows)));
}

const many = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

function shown(name, now) {
  if (now.problem) return element("section", { class: "card" }, element("h2", { text: name }), element("p", { class: "bad", text: now.problem }));
  const lanes = Object.entries(now.lanes || {}).map(([lane, l]) => [lane, number(l.weight), `${(100 * l.share).toFixed(0)} %`, l.waiting, l.running, l.clients]);
  const pools = Object.entries(now.pools || {}).map(([pool, p]) => [pool, p.target, p.running, p.pending, p.workers, p.problem || ""]);
  const jobs = (now.jobs || []).map((j) => [j.id, j.job, j.state.toLowerCase(), j.state === "RUNNING" ? "" : j.reason, j.node]);
  return element("section", { class: "card" }, element("h2", { text: name }),
    element("p", { text: `${now.state}, ${many(now.workers, "worker")} with ${many(now.threads, "thread")}${now.missing ? `; missing workers: ${now.missing}` : ""}` }),
    table(`Lanes of ${name}`, [["Lane"], ["Weight", "n"], ["Share, last 5 min", "n"], ["Waiting", "n"], ["On workers", "n"], ["Clients", "n"]], lanes),
    table(`Pools of ${name}`, [["Pool"], ["Jobs wanted", "n"], ["Running", "n"], ["Pending", "n"], ["Workers", "n"], ["Problem"]], pools),
    table(`Jobs of ${name}`, [["Slurm job"], ["Job"], ["State"], ["Reason"], ["Node"]], jobs));
}

async function load() {
  try {
    const found = Object.entries(await get(`${root}api/v1/clusters`));
    $("told").textContent = found.length ? "" : "This account has no cluster: start one with  cryodask cluster start CLUSTER.yaml";
    $("clusters").replaceChildren(...found.map(([name, now]) => shown(name, now)));
    if (found.length) {
      await usage();
      await showHistory();  // one after the other: while the server asks one question, it answers others from what it knows
    }
  } catch (error) {
    $("told").textContent = error.message;
  }
  setTimeout(load, EVERY_MS);
}

async function usage() {
  const lines = Object.entries(await get(`${root}api/v1/usage`)).flatMap(([name, rows]) => (Array.isArray(rows) ? rows : []).map((r) => [name, r.lane, r.user, number((r.task_seconds ?? 0) / 3600), r.tasks, r.failed]));
  $("usage-section").classList.toggle("hidden", !lines.length);
  $("usage").replaceChildren(table("Usage by lane and user", [["Cluster"], ["Lane"], ["User"], ["Thread hours", "n"], ["Tasks", "n"], ["Failed", "n"]], lines));
}

load();
