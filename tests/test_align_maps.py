"""Maps brought into one frame: poses and centres go with their map, sets can be merged afterwards, and what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _particles import blob_map, ctf_columns, project
from _states import BOX, PIXEL, two_states, write_project

from cryodask.errors import InputError
from cryodask.formats.mrc import write_mrc
from cryodask.kernels.docking import mirrored, moved_map
from cryodask.kernels.orientations import euler_to_matrix, random_rotations
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.stages.align_maps import AlignMapsParams, align_maps, says, turned_poses

pytestmark = pytest.mark.heavy

COUNT = 40
ANGLES = ("rot_deg", "tilt_deg", "psi_deg")


@pytest.fixture(scope="module")
def maps():
    """A molecule of 14 blobs with its half-maps, and the same turned by 132 degrees and moved by 8 A, with noise."""
    own = blob_map(BOX, blobs=14, reach=0.26, width_px=1.6)
    turn = random_rotations(1, torch.Generator().manual_seed(11))[0].double()
    shift = torch.tensor([1.1, -0.7, 0.6])
    noise = 0.05 * float(own.std()) * torch.randn(3, BOX, BOX, BOX, generator=torch.Generator().manual_seed(1))
    halves = np.stack([np.pad((own + 1.4 * n).numpy(), 4) for n in noise[:2]])  # its box is larger
    return {"final_map": halves.mean(0), "half_map": halves, "to_final_map": (moved_map(own, turn, shift) + noise[2]).numpy(),
            "turn": turn.numpy(), "shift": shift.numpy() * PIXEL}  # fmt: skip


@pytest.fixture(scope="module")
def poses():
    """Poses and origins (px) of particles in the first map."""
    rng = np.random.default_rng(4)
    angles = rng.uniform(-180, 180, COUNT), np.degrees(np.arccos(rng.uniform(-1, 1, COUNT))), rng.uniform(0, 360, COUNT)
    return angles, rng.normal(0.0, 1.5, (COUNT, 2))


@pytest.fixture(scope="module")
def result(maps, poses):
    angles, origins = poses
    centres = {f"centre_{axis}_angstrom": -origins[:, i] * PIXEL for i, axis in enumerate("yx")}
    return aligned(maps, **dict(zip(ANGLES, angles)), **centres)


def aligned(maps, **more):
    known = {name: maps[name] for name in ("final_map", "half_map", "to_final_map")}
    given = {**known, "map_pixel_size_angstrom": PIXEL, "to_map_pixel_size_angstrom": PIXEL, **more}
    return align_maps.process(AlignMapsParams(), **given)


def rotations(angles):
    return euler_to_matrix(*(torch.deg2rad(torch.from_numpy(np.asarray(a, np.float64))) for a in angles)).float()


def degrees_between(a, b):
    trace = torch.einsum("nij,nij->n", torch.as_tensor(a).double(), torch.as_tensor(b).double())
    return float(torch.rad2deg(torch.arccos(((trace - 1) / 2).clamp(-1, 1))).max())


def correlation(a, b):
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def test_a_map_is_turned_and_moved_onto_the_other(maps, result):
    # the maps agree to 15 A; half a degree is 0.4 A at the surface of the molecule
    assert degrees_between(result["dock_rotation"].T[None], maps["turn"][None]) < 0.5
    assert np.abs(result["dock_shift_angstrom"] - maps["shift"]).max() < 0.3
    assert correlation(result["final_map"], maps["to_final_map"]) > 0.97
    assert result["half_map"].shape == (2, BOX, BOX, BOX)  # the grid of the other map
    assert "the map and 40 poses turned by" in says(result)


def test_poses_and_centres_go_with_the_map(maps, poses, result):
    """Images of the first map are those of the second at the new poses and centres."""
    angles, origins = poses
    columns = ctf_columns(COUNT, 2)

    def images(volume, its, origins_px):
        return np.asarray(project(torch.from_numpy(volume), rotations(its), torch.from_numpy(origins_px).float(), columns, PIXEL))

    new, centres = [result[name] for name in ANGLES], np.stack([result["centre_y_angstrom"], result["centre_x_angstrom"]], 1)
    before = images(np.ascontiguousarray(maps["final_map"][4:-4, 4:-4, 4:-4]), angles, origins)
    assert correlation(before, images(maps["to_final_map"], new, -centres / PIXEL)) > 0.97
    assert correlation(before, images(maps["to_final_map"], new, origins)) < 0.9
    exact, _ = turned_poses(angles, maps["turn"], maps["shift"])
    assert degrees_between(rotations(exact), rotations(new)) < 0.5


def test_a_mirror_image_is_refused(maps):
    halves = np.stack([mirrored(torch.from_numpy(half)).numpy() for half in maps["half_map"]])
    with pytest.raises(InputError, match="different hands"):
        aligned(maps, final_map=halves.mean(0), half_map=halves)


def test_another_molecule_and_noise_are_refused(maps):
    other = blob_map(BOX, blobs=9, reach=0.3, width_px=1.6, seed=77).numpy()
    with pytest.raises(InputError, match="do not resemble each other"):
        aligned(maps, to_final_map=other)


def test_maps_that_cannot_be_right_are_refused(maps):
    with pytest.raises(InputError, match="empty or contains NaN"):
        aligned(maps, to_final_map=0 * maps["to_final_map"])
    with pytest.raises(InputError, match="a voxel size is wrong"):
        aligned(maps, to_map_pixel_size_angstrom=30.0)


def write_halves(folder, volume):
    noise = 0.1 * volume.std() * torch.randn(2, *volume.shape, generator=torch.Generator().manual_seed(6))
    for half in (1, 2):
        write_mrc(folder / f"half{half}.mrc", (volume + noise[half - 1]).numpy(), PIXEL)


def test_after_it_two_refinements_have_one_frame(tmp_path, client):
    """A run: particles and map of one frame end in that of the other map, and a map of that frame takes them."""
    some = two_states(60)
    path = write_project(tmp_path, some, [])
    whole = 0.6 * some.maps[0] + 0.4 * some.maps[1]
    turn = random_rotations(1, torch.Generator().manual_seed(2))[0].double()
    write_halves(tmp_path, whole)
    write_mrc(tmp_path / "other.mrc", moved_map(whole, turn, torch.zeros(3)).numpy(), PIXEL)
    text = path.read_text().replace("file: map.mrc", "half_maps: [half1.mrc, half2.mrc]")
    text += "- import_map as other: {file: other.mrc}\n"
    path.write_text(text + "- align_maps: {from: {map: import_map, to: other, particles: import_particles}}\n")
    plan = make_plan(path)
    made = plan.graph.step("align_maps").outputs
    assert made["map", "map"].frame == plan.graph.step("other").outputs["map", "map"].frame
    assert set(made["particles", "particles"].pose_frames) == {made["map", "map"].frame}
    found = run_plan(plan, client)
    before, after = (found.particles(name).load() for name in ("import_particles", "align_maps"))
    assert np.array_equal(before["particle_id"], after["particle_id"])
    assert not np.allclose(before["rot_deg"], after["rot_deg"])


def test_a_mask_of_the_old_frame_is_said_to_be_one(tmp_path):
    some = two_states(60)
    path = write_project(tmp_path, some, [])
    write_halves(tmp_path, some.maps[0])
    text = path.read_text().replace("file: map.mrc", "half_maps: [half1.mrc, half2.mrc]") + "- import_map as other: {file: map.mrc}\n"
    text += "- mask: {from: {map: import_map}}\n- align_maps: {from: {map: import_map, to: other}}\n"
    text += "- postprocess: {from: {map: align_maps, mask: mask}}\n"
    path.write_text(text)
    said = "\n".join(make_plan(path).graph.warnings)
    assert (
        "postprocess: the mask of mask was made on the map of import_particles (unknown), but align_maps is in the frame of other" in said
    )
