"""What stage functions say with ``context.report`` becomes events of the run, wherever the function ran."""

from __future__ import annotations

import threading

import numpy as np
import yaml
from test_bad_input import PIXEL, frames_of

from cryodask.formats.movies import write_tiff_movie
from cryodask.run.events import Event, Reported
from cryodask.run.events.progress import text_of
from cryodask.run.events.reports import report_of
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.stage import Params, stage

HEARD = threading.Event()


class NoParams(Params):
    """Nothing to set."""


@stage(version=1, needs=["movie", "pixel_size_angstrom"], gives=["micrograph_sum"], sizes=lambda params, sizes: {n: sizes[n] for n in "yx"})
def reporting_sum(params: NoParams, *, movie, pixel_size_angstrom, context):
    """Says how far it is, and waits until that was heard."""
    context.report(0.5, mean=2)
    context.report(0.6)  # too soon after the first
    assert HEARD.wait(120)
    context.report(1.0)
    return {"micrograph_sum": sum(np.asarray(movie[i], np.float32) for i in range(len(movie)))}


def test_reports_of_an_exposure_are_events_while_it_is_processed(tmp_path):
    from distributed import Client, LocalCluster

    write_tiff_movie(tmp_path / "m.tif", frames_of(0), PIXEL)
    content = {
        "name": "p",
        "inputs": {"movies": "*.tif"},
        "microscope": {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "pixel_size_angstrom": PIXEL},
        "pipeline": ["reporting_sum"],
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
    reports: list[Reported] = []

    def listen(event: Event) -> None:
        if isinstance(event, Reported):
            reports.append(event)
            HEARD.set()

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster, Client(cluster) as client:
        run_plan(make_plan(tmp_path / "p.yaml"), client, listen=[listen])
    first = reports[0]
    assert (first.step, first.row, first.name, first.fraction, first.figures) == ("reporting_sum", 0, "m", 0.5, {"mean": 2.0})
    assert text_of(first, every_exposure=True) == "reporting_sum m: 50%  mean 2"
    # the last one may come after the run has ended
    assert [r.fraction for r in reports] in ([0.5], [0.5, 1.0])
    lines = [line for path in (tmp_path / "p" / "events").glob("*.jsonl") for line in path.read_text().splitlines() if '"Reported"' in line]
    assert len(lines) == len(reports)


def test_without_a_worker_or_a_listener_a_report_is_lost_quietly():
    report_of("cryodask-reports-x", "step")(0.5, {})
    report_of("", "step")(0.5, {})


class Beat:
    """A worker whose events are kept here."""

    def __init__(self):
        self.events = []

    def log_event(self, topic, message):
        self.events.append((topic, message))


def test_one_report_a_second_and_the_last_one_always(monkeypatch):
    now = [0.0]
    worker = Beat()
    monkeypatch.setattr("cryodask.run.events.reports.get_worker", lambda: worker)
    monkeypatch.setattr("cryodask.run.events.reports.time.monotonic", lambda: now[0])
    report = report_of("t", "step", 3, "m")
    for moment, fraction in ((0.0, 0.1), (0.4, 0.2), (1.1, 0.3), (1.2, 1.0)):
        now[0] = moment
        report(fraction, {"n": np.float32(moment)})
    assert [m["fraction"] for _, m in worker.events] == [0.1, 0.3, 1.0]
    assert worker.events[0] == ("t", {"step": "step", "row": 3, "name": "m", "fraction": 0.1, "figures": {"n": 0.0}})
