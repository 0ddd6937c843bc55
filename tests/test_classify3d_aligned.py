"""3D classes with alignment: two molecules and junk told apart, junk removed by decoys, an honest verdict, and what cannot work refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _particles import blob_map, simulate
from _states import two_states, write_project

from cryodask.errors import InputError, ProjectFileError
from cryodask.formats.mrc import write_mrc
from cryodask.kernels.classify3d import floored
from cryodask.kernels.decoys import featureless, scrambled
from cryodask.kernels.fourier import resize_map, soft_sphere
from cryodask.kernels.fsc import fsc
from cryodask.kernels.orientations import euler_to_matrix
from cryodask.kernels.projection import cut_map
from cryodask.report import write_report
from cryodask.run.blocks import ParticlesInMemory, iterate_here, iterate_on_workers
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.stage import ParticleSet
from cryodask.stages.classify3d import LEAST_GAIN_Z, Classify3DParams, classify3d, draw, says

BOX, PIXEL = 32, 7.0
FAST = {"align": True, "resolution_angstrom": 18.0, "mask_diameter_angstrom": 180.0}


def molecules() -> list[torch.Tensor]:
    """A compact molecule and a ring of six blobs, of equal power."""
    body, ring = blob_map(BOX, blobs=6, reach=0.2, width_px=1.8), blob_map(BOX, "C6", blobs=1, seed=4, reach=0.3, width_px=1.8)
    return [body, ring * float(body.norm() / ring.norm())]


def mixture(counts: tuple[int, int, int], snr: float = 0.3, seed: int = 0) -> SimpleNamespace:
    """Particles of both molecules (labels 0 and 1) and junk (2): a third of it noise, the rest blobs of the power of a particle."""
    maps = molecules()
    sets = [
        simulate(maps[k % 2], max(n, 1), pixel=PIXEL, snr=(snr, snr, 0.0)[k], shift_px=0.5, seed=10 * seed + k)
        for k, n in enumerate(counts)
    ]
    rng = np.random.default_rng(seed + 3)
    y, x = np.mgrid[:BOX, :BOX] - BOX / 2
    for image in sets[2][0][: 2 * counts[2] // 3]:
        blobs = np.zeros((BOX, BOX))
        for _ in range(rng.integers(2, 9)):
            cy, cx, width = *rng.normal(0.0, 6.0, 2), rng.uniform(1.2, 3.5)
            blobs += rng.normal() * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2.0 * width**2))
        image += ((blobs - blobs.mean()) / blobs.std() * np.sqrt(snr)).astype(np.float32)
    order = rng.permutation(sum(counts))

    def mixed(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([part[:n] for part, n in zip(parts, counts)])[order]

    columns = {name: mixed([s[1].columns[name] for s in sets]) for name in sets[0][1].columns}
    columns["half_set"] = np.arange(len(order)) % 2
    return SimpleNamespace(
        images=mixed([s[0] for s in sets]), particles=ParticleSet(len(order), BOX, PIXEL, columns), maps=maps,
        labels=mixed([np.full(n, k) for k, n in enumerate(counts)]), rotations=mixed([s[2].numpy() for s in sets]),
    )  # fmt: skip


def given(maps: list[torch.Tensor], pixel: float = PIXEL) -> dict[str, Any]:
    """Inputs with a list of maps, or with one."""
    if len(maps) == 1:
        return {"final_map": maps[0].numpy(), "map_pixel_size_angstrom": pixel}
    return {"maps_final_map": [m.numpy() for m in maps], "maps_map_pixel_size_angstrom": [pixel] * len(maps)}


def classes_of(some: SimpleNamespace, maps: list[torch.Tensor], pixel: float = PIXEL, **params: Any) -> dict[str, Any]:
    asked = Classify3DParams(**{**FAST, **params})
    return iterate_here(classify3d.functions, asked, ParticlesInMemory(some.particles, some.images), given(maps, pixel))


@pytest.fixture(scope="module")
def some() -> SimpleNamespace:
    return mixture((130, 110, 60))


@pytest.fixture(scope="module")
def found(some):
    return classes_of(some, some.maps, classes=4)


pytestmark = pytest.mark.heavy


def test_two_molecules_and_junk_are_told_apart(some, found):
    counts = np.array([np.bincount(some.labels[found["class3d_number"] == k], minlength=3) for k in (1, 2, 3, 4)])
    assert counts.max(1).sum() / 300 > 0.94  # 0.97
    # classes stay in the order of the maps, decoys last
    assert counts[0, 0] >= 128
    assert counts[1, 1] >= 108
    assert counts[2:, :2].sum() <= 2
    assert np.allclose(found["class3d_share"].sum(), 1.0)
    assert found["class_half_map"].shape == (4, 2, BOX, BOX, BOX)


def test_particles_leave_with_the_pose_in_their_class(some, found):
    angles = (torch.deg2rad(torch.from_numpy(found[f"{a}_deg"]).double()) for a in ("rot", "tilt", "psi"))
    rotations = euler_to_matrix(*angles).numpy()
    mine = (some.labels == 0) & (found["class3d_number"] == 1)
    trace = np.einsum("nij,nij->n", rotations[mine], some.rotations[mine])
    error = np.degrees(np.arccos(np.clip((trace - 1.0) / 2.0, -1.0, 1.0)))
    # 11 degrees: at 28 A a molecule of 90 A says no more; a wrong pose is off by 126 degrees in the mean
    assert np.median(error) < 16.0
    origins = np.stack([found["origin_y_angstrom"], found["origin_x_angstrom"]])[:, mine]
    assert 0.2 * PIXEL < origins.std() < PIXEL


def test_maps_of_the_classes_are_those_of_the_molecules(some, found):
    for k in range(2):
        own, other = (float(fsc(torch.from_numpy(found["class_map"][k]), some.maps[m])[2:7].mean()) for m in (k, 1 - k))
        assert own > 0.9
        assert own > other + 0.2


def test_the_sentence_and_the_confusion_of_real_classes(some, found):
    assert found["class_gain_z"] > LEAST_GAIN_Z
    assert "4 classes of" in says(found)
    assert "not support" not in says(found)
    assert found["class3d_confusion"][0, 1] < 0.03
    assert np.allclose(found["class3d_confusion"].sum(1), 1.0)


def test_the_report_shows_all_classes(found):
    import xarray as xr

    dims = {"class_map": "kzyx", "class3d_share": "k", "class3d_resolution_angstrom": "k", "map_pixel_size_angstrom": "",
            "class3d_confusion": "kj", "class3d_separation": "kj", "iteration_class_share": "ik", "iteration_changed_share": "i",
            "class_gain": "", "class_gain_z": "", "rot_deg": "n"}  # fmt: skip
    ds = xr.Dataset({name: (tuple(d), np.asarray(found[name])) for name, d in dims.items()})
    assert [picture.title for picture in draw(ds)] == ["3D classes", "Course of the classification", "Expected confusion"]


def test_one_map_and_decoys_remove_junk():
    """All of 150 good particles stay, and 64 of 75 pieces of junk go; those that stay are blobs that look like a particle at 28 A."""
    some = mixture((150, 0, 75), seed=1)
    number = classes_of(some, some.maps[:1], classes=3)["class3d_number"]
    good, junk = number[some.labels == 0] == 1, number[some.labels == 2] != 1
    assert good.mean() > 0.98
    assert junk.mean() > 0.8


def test_one_molecule_is_not_said_to_be_two():
    alone = mixture((150, 0, 0), seed=2)
    emptied = classes_of(alone, alone.maps[:1], classes=2)
    assert "all particles are in one class" in says(emptied)
    near = [alone.maps[0], resize_map(resize_map(alone.maps[0], 20), BOX) + 0.2 * blob_map(BOX, blobs=3, seed=9)]
    twice = classes_of(alone, near, classes=2, iterations=5)
    assert "do not support" in says(twice) or "all particles are in one class" in says(twice)


# --- what cannot work --------------------------------------------------------------------------------------------------------------
def refused(some: SimpleNamespace, maps: list[torch.Tensor], pixel: float = PIXEL, **params: Any) -> str:
    with pytest.raises(InputError) as error:
        classes_of(some, maps, pixel, **{"classes": 2, **params})
    return str(error.value)


def test_maps_and_particles_that_cannot_work_are_refused(some):
    maps = some.maps
    assert "map 2 of 2 has the wrong contrast" in refused(some, [maps[0], -maps[1]])
    assert "darker than its surroundings" in refused(some, [-maps[0]])
    assert "map 1 is 90 A wide" in refused(some, maps, 90.0 / BOX)
    assert "not a cube" in refused(some, [maps[0][2:-2], maps[1]])
    assert "empty or contains NaN" in refused(some, [0.0 * maps[0], maps[1]])
    assert "too few for 20 classes" in refused(some, maps, classes=20)
    lacking = {**some.particles.columns, "defocus_u_angstrom": np.full(300, np.nan)}
    assert "300 of 300 particles have no CTF" in refused(replace_particles(some, lacking), maps)


def replace_particles(some: SimpleNamespace, columns: dict[str, np.ndarray]) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(some), "particles": replace(some.particles, columns=columns)})


def test_maps_on_other_grids_are_resampled(some):
    fine = [resize_map(one, 40) for one in some.maps]
    functions, params = classify3d.functions, Classify3DParams(**FAST, classes=2)
    state = functions.start(params, some.particles, given(fine, PIXEL * BOX / 40))
    same = functions.start(params, some.particles, given(some.maps))
    assert state["rings"] == same["rings"] == 8
    assert np.abs(state["maps"] - same["maps"]).max() < 0.03 * np.abs(same["maps"]).max()
    blurred = [cut_map(one, 6) for one in some.maps]
    assert functions.start(params, some.particles, given(blurred))["rings"] == 6


def test_the_plan_refuses_what_does_not_fit(tmp_path):
    few = two_states(60)

    def problem(*steps: Any) -> str:
        with pytest.raises(ProjectFileError) as error:
            make_plan(write_project(tmp_path, few, list(steps)))
        return str(error.value)

    initial = {"ab_initio": {"classes": 2}}
    from_all = {"particles": "ab_initio", "maps": ["ab_initio.class1", "ab_initio.class2"]}
    sorted_first = [initial, {"classify3d": {"align": True, "from": from_all}}, {"refine3d": {"from": "classify3d.class1"}}]
    plan = make_plan(write_project(tmp_path, few, sorted_first))
    assert [p.ref for p in plan.graph.step("refine3d").inputs["map"]] == ["classify3d.class1"]
    assert "a list of maps needs alignment" in problem(initial, {"classify3d": {"from": from_all}})
    assert "3 maps are given for 2 classes" in problem(
        initial, {"classify3d": {"align": True, "classes": 2, "from": {**from_all, "maps": ["import_map", *from_all["maps"]]}}}
    )
    assert "a mask needs fixed poses" in problem({"classify3d": {"align": True, "from": {"mask": "import_mask"}}})
    twice = {"map": "import_map", "maps": ["import_map"]}
    assert "given twice, by maps and by map" in problem({"classify3d": {"align": True, "from": twice}})


# --- kernels -----------------------------------------------------------------------------------------------------------------------
def test_a_class_keeps_its_least_share_and_the_order_of_particles_is_kept():
    logits = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).double() * 4.0 + torch.tensor([9.0, 0.0, -20.0])
    posterior = floored(logits, torch.tensor([0.2, 0.2, 0.0]))
    assert posterior.mean(0)[1] > 0.199
    assert posterior.mean(0)[2] < 0.01
    assert torch.equal((posterior[:, 0] / posterior[:, 1]).argsort(), (logits[:, 0] - logits[:, 1]).argsort())
    free = torch.tensor([0.1, 0.0, 0.0])
    assert torch.allclose(floored(logits, free), torch.softmax(logits, 1))


def test_a_decoy_has_the_power_of_its_map_and_nothing_else_of_it():
    volume = molecules()[0]
    ball = soft_sphere(BOX, PIXEL, 80.0, 12.0)
    decoy = scrambled(volume, ball, torch.Generator().manual_seed(0))
    for shell in (3, 6, 9):
        power = [float(fsc_power(one)[shell]) for one in (decoy, volume)]
        assert abs(power[0] / power[1] - 1.0) < 1e-3
    assert float(fsc(decoy, volume)[2:10].abs().mean()) < 0.3
    centre = featureless(volume)
    assert torch.allclose(centre, centre.transpose(0, 2))
    assert float((centre - volume).norm() / volume.norm()) > 0.5
    assert abs(float(centre.sum() / volume.sum()) - 1.0) < 0.02


def fsc_power(volume: torch.Tensor) -> torch.Tensor:
    """Power of each shell."""
    from cryodask.kernels.fsc import half_shells, shell_sum

    return shell_sum(torch.fft.rfftn(volume).abs() ** 2, *half_shells(BOX))


# --- on workers and from a project file --------------------------------------------------------------------------------------------
def test_workers_give_the_same_bits_after_a_restart(some, client, tmp_path):
    """Two passes, the run broken off after the first and resumed from its checkpoint: as in one process without a break."""
    asked = Classify3DParams(**FAST, classes=3, iterations=1)
    alone = iterate_here(classify3d.functions, asked, ParticlesInMemory(some.particles, some.images), given(some.maps))

    def stop(state: Any, metrics: Any) -> None:
        if state["iteration"] == 5:
            raise KeyboardInterrupt

    job = (client, "classify3d", classify3d.functions, asked, ParticlesInMemory(some.particles, some.images), given(some.maps), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        iterate_on_workers(*job, on_iteration=stop)
    again = iterate_on_workers(*job)
    for name in ("class3d_number", "class_map", "rot_deg", "class_gain", "class3d_confusion"):
        assert np.array_equal(again[name], alone[name]), name


def test_later_steps_take_a_class_with_its_map_and_poses(tmp_path, client):
    few = two_states(160)
    for number, one in enumerate(few.maps):
        write_mrc(tmp_path / f"reference{number}.mrc", one.numpy(), 6.0)
    pipeline = [
        *({f"import_map as state{k}": {"file": f"reference{k}.mrc", "symmetry": "C1"}} for k in range(2)),
        {"classify3d": {**FAST, "classes": 2, "iterations": 1, "from": {"maps": ["state0", "state1"]}}},
        {"mask": {"from": {"map": "classify3d.class2"}}},
    ]
    project = run_plan(make_plan(write_project(tmp_path, few, pipeline)), client)
    whole = project.particles("classify3d")
    assert set(np.unique(whole["class3d_number"].values)) <= {1, 2}
    ids = project.particles("classify3d.class2")["particle_id"].values
    assert np.array_equal(ids, whole["particle_id"].values[whole["class3d_number"].values == 2])
    assert not np.allclose(whole["rot_deg"].values, few.particles.columns["rot_deg"], atol=1.0)
    assert project["mask"]["solvent_mask"].shape == (BOX, BOX, BOX)
    assert "decoys last" in write_report(project).read_text()
