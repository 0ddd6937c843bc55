"""Projects pooled by ``import_project`` whose sources change: every result is that of a run from scratch. Toy stages, real runner."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from test_counts import PIPELINE, here, movie, session, write  # noqa: F401  here is a fixture

from cryodask.formats.mrc import write_mrc
from cryodask.run.preview import preview
from cryodask.run.recipe import draft_plan, make_plan
from cryodask.run.session import run_plan
from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

SOURCE = PIPELINE[:5]
LOW = {"select as low": {"where": "position_y_angstrom < 5"}}
HIGH = {"select as high": {"where": "position_y_angstrom > 5", "from": {"particles": "toy_classify"}}}


def imported(project: str, step: str = "toy_classify", name: str = "a") -> dict:
    return {f"import_project as {name}": {"project": project, "step": step}}


def cut(name: str, number: float, particles: str) -> dict:
    return {f"toy_extract as {name}": {"number": number, "from": {"particles": particles}}}


def union(*sources: str, **more) -> dict:
    return {"merge": {**more, "from": {"particles": list(sources)}}}


def process(folder: Path, here, pipeline, name: str = "toy", inputs=None) -> Project:  # noqa: F811
    """Run a pipeline as a project of that name: on the movies, or on what it imports."""
    path = write(folder, pipeline)
    content = yaml.safe_load(path.read_text())
    if "toy_motion" not in str(pipeline):
        del content["inputs"], content["microscope"]
    elif inputs is not None:
        content["inputs"] = inputs
        del content["microscope"]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**content, "name": name}))
    return run_plan(make_plan(folder / f"{name}.yaml"), here)


def table(project: Project, label: str) -> pd.DataFrame:
    """All numbers of the particles of a step, and the sums of their images."""
    found = project.particles(label)
    names = [n for n in sorted(found.data_vars) if found[n].dims == ("particle",) and found[n].dtype.kind in "fi"]
    columns = {n: found[n].values for n in names} | {"image": found["particle_image"].values.sum((1, 2))}
    return pd.DataFrame({"micrograph": found["micrograph"].values, **columns}).sort_values(["micrograph", "position_y_angstrom"])


def assert_same(one: Project, other: Project, *labels: str, of_other: str | None = None) -> None:
    for label in labels:
        a, b = (t.reset_index(drop=True) for t in (table(one, label), table(other, of_other or label)))
        shared = [n for n in a if n in b]
        assert len(shared) > 5
        pd.testing.assert_frame_equal(a[shared], b[shared], check_exact=True)


def forget(folder: Path, here, name: str, *exposures: str, undo: bool = False) -> None:  # noqa: F811
    Project(folder / name).forget_exposures(list(exposures), undo=undo)
    run_plan(make_plan(folder / f"{name}.yaml"), here)


def test_images_of_several_extractions_are_those_of_each_particle(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 2)
    steps = [*SOURCE, LOW, HIGH, cut("small", 2, "low"), cut("large", 3, "high"), union("small", "large")]
    source = process(folder, here, [*steps, "toy_poses"])
    pool = process(folder, here, [imported("toy", "toy_poses"), "toy_classify"], "pool")
    assert_same(pool, source, "a", of_other="toy_poses")
    assert_same(process(folder, here, [imported("pool")], "again"), source, "a", of_other="toy_poses")


def test_what_a_source_made_again_in_the_same_generation_is_taken_again(tmp_path, here):  # noqa: F811
    """A movie goes into a data set with another gain: key and ids of all steps of the source stay what they were."""
    for name, gain in (("g1", 1.0), ("g2", 3.0)):
        write_mrc(tmp_path / f"{name}.mrc", np.full((16, 16), gain, np.float32), 1.0)
        (tmp_path / "movies").mkdir(exist_ok=True)
        for number in (1, 2):
            movie(tmp_path, 10 * int(name[1]) + number)
        shutil.move(tmp_path / "movies", tmp_path / name)
    optics = {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.0}
    inputs = [{"name": n, "movies": f"{n}/*.mrc", "gain": f"{n}.mrc", "microscope": optics} for n in ("g1", "g2")]
    pooled = [imported("toy", "toy_extract"), cut("full", 2, "a"), "toy_classify"]
    process(tmp_path, here, SOURCE[:4], inputs=inputs)
    process(tmp_path, here, pooled, "pool")
    (tmp_path / "g2" / "m021.mrc").rename(tmp_path / "g1" / "m021.mrc")
    process(tmp_path, here, SOURCE[:4], inputs=inputs)
    assert_same(process(tmp_path, here, pooled, "pool"), process(tmp_path, here, pooled, "scratch"), "a", "full")


def test_a_source_that_is_processed_otherwise_is_followed_by_the_steps_on_its_micrographs(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 3)
    pooled = [imported("toy"), "toy_pick", "toy_extract", "toy_classify"]
    process(folder, here, SOURCE)
    process(folder, here, pooled, "pool")
    process(folder, here, [{"toy_motion": {"number": 2}}, *SOURCE[1:]])
    told = {s.step: s.todo for s in preview(draft_plan(folder / "pool.yaml")).steps}
    assert (told["toy_pick"], told["toy_extract"]) == (3, 3)
    pool = process(folder, here, pooled, "pool")
    assert_same(pool, process(folder, here, pooled, "scratch"), "a", "toy_extract")
    # the CTF of the source is read by nothing that picks or cuts
    process(folder, here, [{"toy_motion": {"number": 2}}, {"toy_ctf": {"number": 4}}, *SOURCE[2:]])
    told = {s.step: s.todo for s in preview(draft_plan(folder / "pool.yaml")).steps}
    assert (told["a"], told["toy_pick"], told["toy_extract"]) == (3, 0, 0)


def test_a_pool_of_pools_has_the_micrographs_of_all(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 2)
    process(folder, here, SOURCE, "one")
    shutil.rmtree(folder / "movies")
    (folder / "movies").mkdir()
    for number in (7, 8):
        movie(folder, number)
    process(folder, here, SOURCE, "two")
    process(folder, here, [imported("one", name="a"), imported("two", name="b"), union("a", "b"), "toy_classify"], "pool")
    project = process(folder, here, [imported("pool"), "toy_extract", "toy_classify"], "pools")
    assert project.failures() == []
    assert set(project.particles("toy_extract")["micrograph"].values) == {"m000", "m001", "m007", "m008"}


UNION = [imported("one", name="a"), imported("two", name="b"), union("a", "b", nearer_than_angstrom=1.5, prefer="a")]
POOLS = {
    "cut from the union": [*UNION, "toy_poses", {"toy_extract": {"number": 5}}, "toy_classify"],
    "a step on exposures of the union": [*UNION, "toy_ctf", {"toy_extract": {"number": 5}}, "toy_classify"],
    "picked again": [UNION[0], "toy_pick", {"toy_extract": {"number": 5}}, "toy_classify"],
}


@pytest.mark.parametrize("pipeline", POOLS.values(), ids=POOLS)
def test_sources_that_forget_exposures_and_take_them_back(tmp_path, here, pipeline):  # noqa: F811
    """Two projects of the same movies, processed differently, so that it shows from which of them something comes."""
    folder = session(tmp_path, 4)
    for number, name in enumerate(("one", "two")):
        process(folder, here, [{"toy_motion": {"number": number + 1}}, *SOURCE[1:]], name)
    known = {r["time"] for r in process(folder, here, pipeline, "pool").records("toy_extract").values()}
    for change in (("one", "m001"), ("two", "m002"), ("one", "m003"), ("two", "m003"), ("one", "m001", "m003")):
        name, *exposures = change
        forget(folder, here, name, *exposures, undo=len(exposures) > 1)
        told = {s.step: s for s in preview(draft_plan(folder / "pool.yaml")).steps}
        pool = process(folder, here, pipeline, "pool")
        times = {r.get("computed", r["time"]) for r in pool.records("toy_extract").values()}
        assert told["toy_extract"].todo in (None, len(times - known)), "unknown while a union before it is to be computed"
        known |= times
        assert pool.failures() == []
        assert all(s.done for s in preview(draft_plan(folder / "pool.yaml")).steps)
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        assert_same(pool, process(folder, here, pipeline, "scratch"), "toy_extract", "toy_classify")
