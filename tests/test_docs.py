"""The pages on steps and the project file say what is there: reference, pipelines, printed output, commands, Python."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import typer
import yaml
from _command import command
from _particles import blob_map, simulate

from cryodask.cli import app
from cryodask.formats import star
from cryodask.formats.movies import write_tiff_movie
from cryodask.formats.mrc import write_mrc
from cryodask.run.recipe import draft_plan, make_plan, marked_fields
from cryodask.run.session import run_plan
from cryodask.stage import InputFileMark, SourceFileMark, load_stages

DOCS = Path(__file__).parents[1] / "docs"
STEPS, PROJECT_FILE = DOCS / "steps.md", DOCS / "project-file.md"
DEFAULTS = {
    "name": "p",
    "inputs": {"movies": "movies/*.tif"},
    "microscope": {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 0.885},
}
MOVIES = 24


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


# --- the reference -----------------------------------------------------------------------------------------------------------
def test_the_reference_is_what_the_models_say():
    page = module("make_reference").page()
    assert PROJECT_FILE.read_text() == page, "run  python docs/make_reference.py"
    for stage in load_stages().values():
        if stage.home.startswith("cryodask.stages."):
            section = page.partition(f"\n### {stage.name}\n")[2].partition("\n### ")[0]
            assert all(f"| `{name}` |" in section for name in stage.params.model_fields), stage.name
            assert all(f"`{port.name}`" in section for port in stage.ports), stage.name
    assert "PydanticUndefined" not in page
    assert not re.search(r"<class|typing\.|object at", page)


@pytest.mark.parametrize(
    "page", [STEPS, PROJECT_FILE, DOCS / "own-stage.md", DOCS / "other-programs.md", DOCS / "map.md"], ids=lambda p: p.name
)
def test_links_and_headings_are_there(page):
    for target in re.findall(r"\]\(([^)#\s]*)(#[^)\s]+)?\)", page.read_text()):
        path, anchor = target
        other = (page.parent / path) if path and "://" not in path else page
        assert other.exists(), path
        if anchor:
            heads = {
                re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            }
            assert anchor[1:] in heads, f"{path}{anchor}"


def test_the_picture_is_drawn_from_the_graph(tmp_path):
    made = module("make_graph_picture")
    (tmp_path / "e.yaml").write_text(made.example())
    made.draw(draft_plan(tmp_path / "e.yaml").graph, tmp_path / "e.png")
    assert (tmp_path / "e.png").read_bytes()[:4] == (DOCS / "images" / "steps.png").read_bytes()[:4] == b"\x89PNG"


# --- project files -----------------------------------------------------------------------------------------------------------
def write_named_files(folder: Path, content: dict[str, Any]) -> None:
    """Movies, gains, STAR files and maps that a project file names."""
    inputs = content.get("inputs") or {}
    for one in inputs if isinstance(inputs, list) else [inputs]:
        if one.get("movies"):
            for i in range(MOVIES):
                movie(folder / one["movies"].replace("*", f"m{i:04d}"), i)
        if one.get("gain"):
            write_mrc(made(folder / one["gain"]), np.ones((512, 512), np.float32), 1.0)
    for short in ("micrographs", "particles"):
        if isinstance(inputs, dict) and inputs.get(short):
            table(folder / inputs[short])
    if isinstance(inputs, dict) and inputs.get("coordinates"):
        table(folder / inputs["coordinates"] / "m0000.star")
    for path in inputs.get("half_maps") or () if isinstance(inputs, dict) else ():
        density(folder / path)
    for step in content["pipeline"]:
        head, params = next(iter(step.items())) if isinstance(step, dict) else (step, None)
        model = load_stages()[str(head).partition(" as ")[0]].params
        for mark, write in ((InputFileMark, density), (SourceFileMark, table)):
            for name in marked_fields(model, mark):
                given = (params or {}).get(name) or ()
                for path in [given] if isinstance(given, str) else given:
                    write(folder / path / "m0000.star" if name == "folder" else folder / path)


def made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def movie(path: Path, seed: int) -> None:
    tifffile.imwrite(made(path), np.random.default_rng(seed).poisson(2, (2, 512, 512)).astype(np.uint8), photometric="minisblack")


def density(path: Path) -> None:
    write_mrc(made(path), np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32), 1.0)


def table(path: Path) -> None:
    labels = (
        "rlnMicrographName",
        "rlnImageName",
        "rlnCoordinateX",
        "rlnCoordinateY",
        "rlnDefocusU",
        "rlnAngleRot",
        "rlnAngleTilt",
        "rlnAnglePsi",
    )
    star.write_tables(made(path), {"": {label: ["1"] for label in labels}})


def example(block: str, folder: Path) -> Path | None:
    """A block as a project file with all that it names; None where it is neither a whole one nor a pipeline."""
    content = yaml.safe_load(block)
    if not isinstance(content, dict) or "pipeline" not in content:
        return None
    content = content if "name" in content else {**DEFAULTS, **content}
    write_named_files(folder, content)
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


EXAMPLES = [(page, i, block) for page in (STEPS, PROJECT_FILE) for i, block in enumerate(blocks(page, "yaml"))]


def test_both_pages_have_examples():
    assert [page.name for page, _, _ in EXAMPLES] == ["steps.md"] * 4 + ["project-file.md"] * 2


@pytest.mark.parametrize(("page", "number", "block"), EXAMPLES, ids=[f"{p.stem} {i}" for p, i, _ in EXAMPLES])
def test_every_pipeline_of_the_pages_resolves(page, number, block, tmp_path):
    path = example(block, tmp_path)
    assert path is not None
    graph = draft_plan(path).graph
    assert graph.problems == ()
    assert graph.warnings == ()
    labels = {str(next(iter(s)) if isinstance(s, dict) else s).rpartition(" as ")[2] for s in yaml.safe_load(block)["pipeline"]}
    assert labels <= {s.label for s in graph.steps}


def test_comments_of_the_from_example_are_true(tmp_path):
    path = example(blocks(STEPS, "yaml")[1], tmp_path)
    assert path is not None
    graph = draft_plan(path).graph
    taken = {(s.label, port): [p.ref for p in products] for s in graph.steps for port, products in s.inputs.items()}
    assert taken["all", "particles"] == ["extract"]
    assert taken["all", "map"] == ["refine3d"]
    assert (taken["best", "particles"], taken["best", "map"]) == (["curate"], ["ab_initio"])
    assert (taken["checked", "particles"], taken["checked", "map"]) == (["best"], ["all"])
    assert taken["merge", "particles"] == ["best", "all"]


def test_every_set_stage_has_an_example():
    sets = {s.name for s in load_stages().values() if s.shape == "set" and not s.person and s.home.startswith("cryodask.stages.")}
    used = {
        str(next(iter(s)) if isinstance(s, dict) else s).partition(" as ")[0] for s in yaml.safe_load(blocks(STEPS, "yaml")[2])["pipeline"]
    }
    listed = set(re.findall(r"^\| `(\w+)` \|", STEPS.read_text().partition("## Sets as steps")[2].partition("## ")[0], re.MULTILINE))
    assert listed == sets <= used


# --- what is printed ---------------------------------------------------------------------------------------------------------
def test_the_dry_run_of_the_page_is_what_is_printed(tmp_path):
    path = example(blocks(STEPS, "yaml")[0], tmp_path)
    # the estimates follow from the header of the first movie
    write_tiff_movie(tmp_path / "movies" / "m0000.tif", np.zeros((40, 2048, 2048), np.uint8), 0.885)
    shown = command("run", path, "--dry-run", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.replace(str(tmp_path), "/data/session") == blocks(STEPS, "text")[0]
    assert not (tmp_path / "betagal").exists(), "nothing is written"


# --- commands ----------------------------------------------------------------------------------------------------------------
def commands(page: Path) -> list[str]:
    """Commands in console blocks, and those in the text that begin with ``cryodask``."""
    text = page.read_text(encoding="utf-8")
    found = [line.removeprefix("$ ") for block in blocks(page, "console", "") for line in block.splitlines()]
    inline = re.findall(r"`(cryodask [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [c for c in dict.fromkeys([*found, *inline]) if c.startswith("cryodask ")]


COMMANDS = [c for page in (STEPS, PROJECT_FILE) for c in commands(page)]


def test_the_pages_show_commands():
    assert {shlex.split(c)[1] for c in COMMANDS} >= {"run", "history", "keep", "compare", "gc", "forget", "where", "export", "stages"}


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_every_command_of_the_pages_exists(line):
    name, *words = shlex.split(line, comments=True)[1:]
    found = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    # parsing only: unknown options and arguments too many or too few are errors, nothing is called
    if words:
        found.make_context(name, words)
    assert command(name, "--help").returncode == 0


# --- in Python ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory, client) -> Path:
    """A folder with the small finished project ``betagal``: two refinements of 80 simulated particles in two micrographs."""
    folder = tmp_path_factory.mktemp("python")
    volume = blob_map(32, "D2")
    images, particles, _, origins = simulate(volume, 80, pixel=4.0, snr=0.5)
    write_mrc(folder / "p.mrcs", images, 4.0, stack=True)
    write_mrc(folder / "start.mrc", volume.numpy(), 4.0)
    columns = {
        **particles.columns,
        "micrograph_name": np.array([f"m{i % 2}.mrc" for i in range(80)], dtype=object),
        "particle_y": 100.0 + np.arange(80),
        "particle_x": 100.0 + np.arange(80),
        "image_index": np.arange(80),
        "image_stack": "p.mrcs",
        "particle_pixel_size_angstrom": 4.0,
        "pixel_size_angstrom": 4.0,
        "box": 32,
    }
    star.write_particles(folder / "p.star", columns)
    assert torch.isfinite(origins).all()
    for iterations in (1, 2):
        content = {
            "name": "betagal",
            "inputs": {"particles": "p.star"},
            "pipeline": [{"refine3d": {"reference": "start.mrc", "symmetry": "D2", "iterations": iterations}}],
        }
        (folder / "betagal.yaml").write_text(yaml.safe_dump(content))
        run_plan(make_plan(folder / "betagal.yaml"), client)
    return folder


def test_the_python_of_the_page_runs(finished, monkeypatch, capsys):
    (code,) = blocks(STEPS, "python")
    monkeypatch.chdir(finished)
    names: dict[str, Any] = {}
    exec(compile(code, str(STEPS), "exec"), names)
    assert names["particles"].sizes["particle"] == 80
    assert [m.params["iterations"] for m in names["project"].history("refine3d")] == [1, 2]
    assert names["older"].attrs != names["project"]["refine3d"].attrs
    assert len(names["table"]) == 2
    assert "param iterations" in capsys.readouterr().out


def test_earlier_results_can_be_listed_kept_and_compared(finished):
    """The section on earlier results, with the keys that this project has."""
    import cryodask

    key = cryodask.open(finished / "betagal").history("refine3d")[0].key
    said = []
    block = next(b for b in blocks(STEPS, "console") if "cryodask keep" in b)
    for line in block.splitlines():
        words = shlex.split(line.removeprefix("$ ").replace("3f2a", key[:6]))
        shown = command(*words[1:], folder=finished)
        assert shown.returncode == 0, shown.stderr
        said.append(shown.stdout)
    assert key in said[0]
    assert "iterations" in said[2]
    assert (finished / "fsc.png").is_file()
    assert key not in said[3], "it has a name"
    assert [m.name for m in cryodask.open(finished / "betagal").history("refine3d")] == ["best so far", ""]


def test_a_key_after_a_step_pins_an_earlier_result(finished, client):
    import cryodask

    first, second = cryodask.open(finished / "betagal").history("refine3d")[:2]
    content = yaml.safe_load((finished / "betagal.yaml").read_text())
    content["pipeline"] += [{"mask": {"from": f"refine3d@{first.key}"}}, "mask as now"]
    (finished / "pinned.yaml").write_text(yaml.safe_dump({**content, "folder": "betagal"}))
    done = run_plan(make_plan(finished / "pinned.yaml"), client)
    used = {label: set(done.step(label).inputs["map"][0].parts.values()) for label in ("mask", "now")}
    assert used == {"mask": {first.place}, "now": {second.place}}


def test_a_step_of_a_person_waits(tmp_path):
    block = blocks(STEPS, "yaml")[2 + 1]
    path = example(block.replace("{keep: [1, 2, 5]}", "{}"), tmp_path)
    shown = command("run", path, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^  select_classes  waits for a person ", shown.stdout, re.MULTILINE)
