"""Two pages on the scheduler's web server: ``/cryodask/metrics`` for Prometheus, and ``/lanes`` on Dask's dashboard."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from importlib import import_module
from itertools import pairwise
from typing import Any

from tornado import web
from tornado.ioloop import IOLoop

from cryodask.cluster.accounting.accounting import KEYS, NO_POOL, Accounting, Sample
from cryodask.cluster.dashboard import DashboardOnDemand
from cryodask.cluster.fairshare import FairShareScheduler

_STEP_SECONDS = 10.0
_OVER_SECONDS = 30.0
_HEIGHT = 300


def add_pages(scheduler: FairShareScheduler, accounting: Accounting) -> None:
    """Add both pages to a scheduler that serves HTTP; the second one only if it has Dask's dashboard."""
    server = getattr(scheduler, "http_application", None)
    if server is None:
        return
    server.add_handlers(r".*", [(r".*/cryodask/metrics", _Metrics, {"scheduler": scheduler, "accounting": accounting})])
    for later in server.applications:
        if isinstance(later, DashboardOnDemand):
            later.then.append(functools.partial(_add_lanes, scheduler, accounting))
    _add_lanes(scheduler, accounting)


def _add_lanes(scheduler: FairShareScheduler, accounting: Accounting) -> None:
    server: Any = scheduler.http_application
    dashboards = [app for app in server.applications if hasattr(app, "app_paths")]
    if not dashboards:
        return
    from distributed.dashboard.core import BokehApplication
    from distributed.dashboard.scheduler import template_variables

    variables = template_variables(scheduler)
    variables["pages"][1:1] = ["lanes"]  # in the menu of every page
    page = BokehApplication(
        {"/lanes": functools.partial(_lanes_page, accounting)}, scheduler, prefix=dashboards[0].prefix, template_variables=variables
    )
    server.add_application(page)
    page.initialize(IOLoop.current())
    page.start()


# --- for Prometheus --------------------------------------------------------------------------------------------------------------
class _Metrics(web.RequestHandler):
    def initialize(self, scheduler: FairShareScheduler, accounting: Accounting) -> None:
        self._scheduler, self._accounting = scheduler, accounting

    def get(self) -> None:
        self.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.write(metrics(self._scheduler, self._accounting))


def metrics(scheduler: FairShareScheduler, accounting: Accounting) -> str:
    """Usage since the scheduler started and the current lanes, in Prometheus' text format."""
    used = accounting.since_start()
    placed = [(dict(zip(KEYS, path)), use) for path, use in used.items() if path[-1] != NO_POOL]
    waited = [(dict(zip(KEYS[:-1], path)), use) for path, use in used.items() if path[-1] == NO_POOL]
    outcomes = {"done": "tasks", "failed": "failed", "lost": "lost"}
    runs = [({**labels, "outcome": name}, getattr(use, figure)) for labels, use in placed for name, figure in outcomes.items()]
    lanes = scheduler.lanes_now()
    families: list[tuple[str, str, str, list[tuple[dict[str, str], float]]]] = [
        ("task_seconds_total", "counter", "Seconds for which tasks held a thread.", [(labels, use.task_seconds) for labels, use in placed]),
        ("task_runs_total", "counter", "Runs of tasks: done, failed, or lost.", runs),
        ("result_bytes_total", "counter", "Bytes of results.", [(labels, use.bytes) for labels, use in placed]),
        (
            "waiting_seconds_total",
            "counter",
            "Number of ready tasks waiting on the scheduler, integrated over time, in seconds.",
            [(labels, use.waiting_seconds) for labels, use in waited],
        ),
    ]
    families += [
        (f"lane_{name}", "gauge", text, [({"lane": lane}, now[name]) for lane, now in lanes.items()])
        for name, text in (
            ("weight", "Weight of the lane."),
            ("waiting", "Ready tasks waiting on the scheduler."),
            ("running", "Tasks on workers."),
            ("clients", "Connected clients."),
        )
    ]
    return "".join(_family(*family) for family in families)


def _family(name: str, kind: str, text: str, values: Iterable[tuple[Mapping[str, str], float]]) -> str:
    lines = [f"# HELP cryodask_{name} {text}\n# TYPE cryodask_{name} {kind}\n"]
    for labels, value in values:
        inside = ",".join(f'{label}="{_escaped(given)}"' for label, given in labels.items())
        lines.append(f"cryodask_{name}{{{inside}}} {value:.10g}\n")
    return "".join(lines)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


# --- for people ------------------------------------------------------------------------------------------------------------------
def history(samples: Iterable[Sample]) -> tuple[list[float], dict[str, list[float]], dict[str, list[float]]]:
    """Times, and per lane its share of the workers' time in percent and its waiting tasks, both smoothed over half a minute."""
    kept: list[Sample] = []
    for sample in samples:
        if not kept or sample.when - kept[-1].when >= _STEP_SECONDS - 0.5:
            kept.append(sample)
    lanes = sorted({lane for sample in kept for lane in (*sample.seconds, *sample.waiting)})
    # an interrupted run may reduce what was counted as running
    gained = [{lane: max(0.0, new.seconds.get(lane, 0.0) - old.seconds.get(lane, 0.0)) for lane in lanes} for old, new in pairwise(kept)]
    over = max(1, round(_OVER_SECONDS / _STEP_SECONDS))
    shares: dict[str, list[float]] = {lane: [] for lane in lanes}
    for i in range(len(gained)):
        window = gained[max(0, i + 1 - over) : i + 1]
        total = sum(sum(step.values()) for step in window)
        for lane in lanes:
            shares[lane].append(100 * sum(step[lane] for step in window) / total if total > 0 else 0.0)
    return (
        [1000 * sample.when for sample in kept[1:]],
        shares,
        {lane: [float(sample.waiting.get(lane, 0)) for sample in kept[1:]] for lane in lanes},
    )


def _lanes_page(accounting: Accounting, scheduler: Any, extra: dict[str, Any], doc: Any) -> None:
    from distributed.dashboard.components.scheduler import env

    doc.title = "Dask: Lanes"
    panel = LanesPanel(accounting)
    panel.update()
    doc.add_periodic_callback(panel.update, 1000)
    doc.add_root(panel.root)
    doc.template = env.get_template("simple.html")
    doc.template_variables.update(extra)


class LanesPanel:
    """Two figures of the last hour: the lanes' shares of the workers' time, and their waiting tasks."""

    def __init__(self, accounting: Accounting) -> None:
        # optional, and its type hints are incomplete
        layouts, plotting, self._models = (import_module(f"bokeh.{name}") for name in ("layouts", "plotting", "models"))
        self._accounting = accounting
        self._lanes: list[str] = []
        self._source: Any = self._models.ColumnDataSource({"time": []})
        options: dict[str, Any] = {"x_axis_type": "datetime", "height": _HEIGHT, "sizing_mode": "stretch_width"}
        options["tools"] = "xpan,xwheel_zoom,reset"
        self._shares = plotting.figure(title="Share of the workers' time", y_range=(0, 100), y_axis_label="% of task seconds", **options)
        self._waiting = plotting.figure(title="Ready tasks waiting", x_range=self._shares.x_range, y_axis_label="tasks", **options)
        self._waiting.y_range.start = 0
        formats = dict.fromkeys(("seconds", "minsec", "minutes", "hourmin", "hours"), "%H:%M:%S")
        for plot in (self._shares, self._waiting):
            plot.add_layout(self._models.Legend(items=[]), "right")
            plot.xaxis.formatter = self._models.DatetimeTickFormatter(**formats)
        self.root = layouts.column(self._shares, self._waiting, sizing_mode="stretch_width")

    def update(self) -> None:
        """Update the figures."""
        times, shares, waiting = history(self._accounting.samples)
        for lane in shares:
            if lane not in self._lanes:
                self._add(lane)
        data: dict[str, list[float]] = {"time": times}
        below = [0.0] * len(times)
        for lane in self._lanes:
            above = [a + b for a, b in zip(below, shares.get(lane, below))]
            data |= {f"{lane} from": below, f"{lane} to": above, f"{lane} waiting": waiting.get(lane, [0.0] * len(times))}
            below = above
        self._source.data = data

    def _add(self, lane: str) -> None:
        color = import_module("bokeh.palettes").Colorblind8[len(self._lanes) % 8]
        self._lanes.append(lane)
        for part in ("from", "to", "waiting"):
            self._source.data[f"{lane} {part}"] = [0.0] * len(self._source.data["time"])
        area = self._shares.varea("time", f"{lane} from", f"{lane} to", color=color, alpha=0.85, source=self._source)
        line = self._waiting.line("time", f"{lane} waiting", color=color, line_width=2, source=self._source)
        for plot, drawn in ((self._shares, area), (self._waiting, line)):
            plot.legend.items = [*plot.legend.items, self._models.LegendItem(label=lane, renderers=[drawn])]
