"""The package of docs/own-stage.md, installed with pip: used, broken in every part, and removed again."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _fresh import Fresh
from _once import simulated
from test_docs import blocks

from cryodask.errors import PluginError
from cryodask.formats.movies import open_movie
from cryodask.plugins import Plugins, PluginWarning
from cryodask.simulate import SessionParams
from cryodask.stage import STAGES, Params, stage

pytestmark = pytest.mark.heavy

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "own-stage.md"
PARTS = ("ice_ring", "npy", "csv", "threads")


@pytest.fixture(scope="module")
def fresh() -> Iterator[Fresh]:
    with Fresh() as made:
        yield made


def install(source: Path, target: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The session of the page; ``package`` is the source and ``installed`` where pip put it."""
    made = tmp_path_factory.mktemp("plugins")
    simulated(
        tmp_path_factory, made, SessionParams(movies=3, height=384, width=384, frames=3, dose_per_frame=10, particles=8, truth_maps=())
    )
    for path in sorted((made / "movies").glob("*.tif")):
        movie = open_movie(path)
        np.save(path.with_suffix(".npy"), np.stack([movie[i] for i in range(len(movie))]))
        path.unlink()
    (made / "package").mkdir()
    for text in blocks(PAGE, "toml", "python", "yaml"):
        if named := re.match(r"# ([\w.]+)\n", text):
            home = made if named[1].endswith(".yaml") else made / "package"
            (home / named[1]).write_text(text)
    install(made / "package", made / "installed")
    return made


@pytest.fixture(scope="module")
def used(folder, fresh) -> Path:
    """The commands of the page have been carried out."""
    (made, listed), run = [text.strip().splitlines() for text in blocks(PAGE, "sh")]
    assert made == "pip install ./icewatch"
    for line in (listed, *run):
        shown = fresh.shell(line, folder, folder / "installed")
        assert shown.returncode == 0, shown.stderr
        assert "PluginWarning" not in shown.stderr
    return folder


def broken(folder: Path, tmp_path: Path, change: Any) -> Path:
    """The package installed with a change to its module."""
    shutil.copytree(folder / "installed", tmp_path / "broken")
    module = tmp_path / "broken" / "icewatch.py"
    before = module.read_text()
    module.write_text(change(before))
    assert module.read_text() != before
    return tmp_path / "broken"


# --- installed -----------------------------------------------------------------------------------------------------------------------
def test_the_package_of_the_page_works_in_every_part(used):
    assert sorted(p.name for p in (used / "installed").glob("*.dist-info")) == ["icewatch-1.0.dist-info"]
    lines = (used / "tables" / "ice.csv").read_text().splitlines()
    assert lines[0] == "micrograph,ice_ring_strength"
    assert len(lines) == 4
    assert all(0.5 < float(line.split(",")[1]) < 2 for line in lines[1:])
    report = (used / "session" / "report.html").read_text()
    assert "Power at the ice ring over the power beside it" in report
    assert "A figure failed" not in report


def test_the_stage_is_a_function_on_datasets_with_the_same_bits(used, fresh):
    (code,) = [b for b in blocks(PAGE, "python") if not b.startswith("# ")]
    shown = fresh.python(code, used, used / "installed")
    assert shown.returncode == 0, shown.stderr


# --- removed ---------------------------------------------------------------------------------------------------------------------------
def test_results_stay_readable_where_the_package_is_not_installed(used, fresh):
    code = """
import cryodask, sys
project = cryodask.open("session")
column = project["ice_ring"]["ice_ring_strength"]
assert column.attrs == {"units": "1", "long_name": "power at the ice ring over that beside it"}, column.attrs
assert column.shape == (3,) and float(column.min()) > 0
assert "ice_ring_strength" in project.joined() and "ice_ring_strength" in project.scalars()
project.history("ice_ring")
assert "icewatch" not in sys.modules
"""
    shown = fresh.python(code, used)
    assert (shown.returncode, shown.stderr) == (0, "")
    for words in ("info", "verify", "history", "gc", "report --output without.html"):
        shown = fresh.shell(f"cryodask {words} session", used)
        assert shown.returncode == 0, (words, shown.stderr)
    page = (used / "without.html").read_text()
    assert "The stage ice_ring is not installed, so its figures are missing." in page
    assert "Motion over the session" in page


def test_what_needs_the_package_says_so_where_it_is_not_installed(used, fresh):
    shown = fresh.shell("cryodask run session.yaml --dry-run", used)
    assert shown.returncode == 2
    assert "There is no stage 'ice_ring'" in shown.stdout
    assert "a stage of another package needs that package to be installed" in shown.stdout
    shown = fresh.shell("cryodask export session --to csv tables2", used)
    assert "There is no exporter 'csv'" in shown.stderr
    assert "use one of these: relion" in shown.stderr
    shown = fresh.python("from cryodask.cluster import connect; connect('threads.yaml')", used)
    assert "there is no kind of cluster 'threads'" in shown.stderr
    shown = fresh.python("from cryodask.formats.movies import open_movie; open_movie('movies/movie_0001.npy')", used)
    assert "install a package that reads the format" in shown.stderr


# --- broken ----------------------------------------------------------------------------------------------------------------------------
def test_a_package_that_cannot_be_imported_warns_once_and_breaks_nothing_else(used, tmp_path, fresh):
    target = broken(used, tmp_path, lambda text: text.replace("import numpy as np", "import nunpy as np"))
    shown = fresh.shell("cryodask stages", used, target)
    assert shown.returncode == 0
    assert "refine3d" in shown.stdout
    assert "ice_ring" not in shown.stdout
    assert shown.stderr.count("PluginWarning") == 1
    assert (
        "ice_ring (cryodask.stages) of the package icewatch 1.0 cannot be loaded: ModuleNotFoundError: No module named 'nunpy'"
        in shown.stderr
    )
    shown = fresh.shell("cryodask run session.yaml --dry-run", used, target)
    assert shown.returncode == 2
    assert "There is no stage 'ice_ring'" in shown.stdout
    assert "No module named 'nunpy'" in shown.stdout
    for line in ("cryodask info session", "cryodask report session --output broken.html"):
        shown = fresh.shell(line, used, target)
        assert shown.returncode == 0, shown.stderr
    assert "No module named &#39;nunpy&#39;" in (used / "broken.html").read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "def ice_ring(params: IceRingParams, *, context: Context,",
            "def ice_ring(params: IceRingParams, *,",
            r"ice_ring\(params, \*, context, micrograph_sum, pixel_size_angstrom\).* got an unexpected keyword argument 'context'",
        ),
        (
            "def ice_ring(params: IceRingParams, *, context: Context, micrograph_sum: np.ndarray, pixel_size_angstrom: float)",
            "def ice_ring(params: IceRingParams, **given)",
            r"hides its arguments behind \*\*given; spell them out",
        ),
        ("*, context: Context,", "*, context: Context, threshold,", "missing a required argument: 'threshold'"),
        ('gives=["ice_ring_strength"]', 'gives=["ice_strength"]', "variables that are not in the vocabulary: ice_strength"),
        ("def ice_ring(", "def motion(", "Two stages are called 'motion'"),
    ],
)
def test_a_stage_that_the_runner_cannot_call_is_refused_when_it_is_registered(used, tmp_path, old, new, said, fresh):
    target = broken(used, tmp_path, lambda text: text.replace(old, new, 1))
    shown = fresh.shell("cryodask stages", used, target)
    assert shown.returncode == 0
    assert "\nmotion " in shown.stdout
    assert re.search(said, shown.stderr), shown.stderr
    assert shown.stderr.count("PluginWarning") == 1


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ('NPY = Reader((".npy",), open_npy)', "NPY = open_npy", "", "it is a function, not a cryodask.formats.movies.Reader"),
        ('Reader((".npy",)', 'Reader((".tif",)', "", r"\.tif is not a valid extension"),
        ("def open_npy(path)", "def open_npy()", "", r"open is called as open\(path\)"),
        (
            "def write_csv(project, folder)",
            "def write_csv(project)",
            "cryodask export session --to csv x",
            r"it is called as csv\(project, folder\)",
        ),
        ("class Threads(PluginSettings)", "class Threads(Params)", "", "it is not a subclass of cryodask.cluster.settings.PluginSettings"),
    ],
)
def test_other_parts_are_refused_with_the_reason(used, tmp_path, old, new, line, said, fresh):
    target = broken(used, tmp_path, lambda text: text.replace(old, new, 1))
    # the other parts of the package work
    code = """
import sys
import cryodask.formats.movies as movies, cryodask.cluster.settings as settings
from cryodask.cli import main
movies.OTHERS.load(), settings.OTHERS.load()
sys.argv = ["cryodask", "stages", "ice_ring"]
main()
"""
    shown = fresh.shell(line, used, target) if line else fresh.python(code, used, target)
    assert line or shown.returncode == 0, shown.stderr
    assert re.search(said, shown.stderr), shown.stderr
    assert shown.stderr.count("PluginWarning") == 1


def test_a_figure_that_fails_is_a_box_with_the_error(used, tmp_path, fresh):
    target = broken(used, tmp_path, lambda text: text.replace('dataset["ice_ring_strength"].values, "."', '1 / 0, "."'))
    shown = fresh.shell("cryodask report session --output failed.html", used, target)
    assert shown.returncode == 0, shown.stderr
    page = (used / "failed.html").read_text()
    assert re.search(
        r'class="failed"><b>A figure failed</b><br>\s*<figcaption>ZeroDivisionError: division by zero \(icewatch.py, line \d+\)', page
    )
    assert "Motion over the session" in page


# --- without a package -----------------------------------------------------------------------------------------------------------------
class NoParams(Params):
    """None."""


@pytest.mark.parametrize("missing", ["halves", "expect", "result"])
def test_block_stages_are_refused_without_one_of_their_functions(missing):
    functions = {name: staticmethod(f) for name, f in _blocks().items() if name != missing}
    kind = type("incomplete", (), {"__doc__": "Nothing.", **functions, **({} if missing == "halves" else {"halves": 1})})
    with pytest.raises(PluginError, match=f"halves must be 1 or 2|it has no function {missing}") as refused:
        stage(version=1, shape="blocks", needs=["particle_image"], gives=["annotation"], params=NoParams)(kind)
    assert "Stage incomplete of" in str(refused.value)
    assert "incomplete" not in STAGES


def _blocks() -> dict[str, Any]:
    return {
        "start": lambda params, particles, inputs: {},
        "load": lambda params, state, block, context: None,
        "cache_key": lambda params, state: 0,
        "prepare": lambda params, state, half, context: None,
        "expect": lambda params, state, shared, block, previous, context: ({}, {}),
        "maximise": lambda params, state, sums, context: (state, {}),
        "finished": lambda params, state: True,
        "result": lambda params, state, columns: {},
    }


def test_a_package_is_loaded_once_and_warns_once(tmp_path, monkeypatch):
    info = tmp_path / "worse-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: worse\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[cryodask.nothing]\nbad = worse\ngood = math:pi\n")
    (tmp_path / "worse.py").write_text("raise SystemExit('I end programs')")
    monkeypatch.syspath_prepend(str(tmp_path))
    things = Plugins("cryodask.nothing")
    with pytest.warns(PluginWarning, match="bad .* of the package worse 2.0 cannot be loaded: SystemExit: I end programs. It is skipped"):
        assert set(things.load()) == {"good"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(things.load()) == {"good"}
    assert "I end programs" in things.hint("bad")
