"""Signal subtraction: what is left of images of two parts is one of them, also with aberrations; runs, refusals, what comes after."""

from __future__ import annotations

import math
from dataclasses import replace

import mrcfile
import numpy as np
import pytest
import torch
from _particles import blob_map, ctf_columns, project
from _states import BOX, PIXEL, blob, inputs_of, two_states, write_project

from cryodask.errors import InputError, MicrographError, ProjectFileError
from cryodask.formats.mrc import write_mrc
from cryodask.interop import export_relion
from cryodask.kernels import subtraction as sub
from cryodask.kernels.aberrations import corrected
from cryodask.kernels.orientations import matrix_to_euler, random_rotations
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.stage import ParticleBlock
from cryodask.stages.subtract import SubtractParams, says, subtract

pytestmark = pytest.mark.heavy

COUNT = 60


@pytest.fixture(scope="module")
def parts():
    """Two parts of a molecule and images of both, without noise, protein white."""
    kept, gone = blob_map(BOX, blobs=5, reach=0.15, width_px=2.0), blob((0.0, 5.0, 8.0))
    rotations = random_rotations(COUNT, torch.Generator().manual_seed(3))
    origins = np.random.default_rng(3).normal(0.0, 1.0, (COUNT, 2))
    columns = ctf_columns(COUNT, 3)
    one, other = (project(m, rotations, torch.from_numpy(origins).float(), columns, PIXEL) for m in (kept, gone))
    # what is kept covers the first part and nothing of the second
    mask = ((kept > 0.02 * kept.max()) & (gone < 0.02 * gone.max())).float().numpy()
    return {"kept": kept, "gone": gone, "rotations": rotations, "origins": origins, "columns": columns, "one": np.asarray(one),
            "other": np.asarray(other), "mask": mask}  # fmt: skip


def block_of(parts, images, **columns):
    angles = dict(zip(("rot_deg", "tilt_deg", "psi_deg"), (np.degrees(a.numpy()) for a in matrix_to_euler(parts["rotations"].double()))))
    origins = {f"origin_{axis}_angstrom": parts["origins"][:, i] * PIXEL for i, axis in enumerate("yx")}
    known = {
        "particle_id": np.arange(COUNT),
        "half_set": np.arange(COUNT) % 2,
        "particle_y": np.zeros(COUNT),
        "particle_x": np.zeros(COUNT),
    }
    return ParticleBlock(
        np.arange(COUNT), np.asarray(images, np.float32), {**parts["columns"], **angles, **origins, **known, **columns}, PIXEL
    )


def subtracted(parts, block, half_maps=None, mask=None, **params):
    whole = (parts["kept"] + parts["gone"]).numpy()
    return subtract.process(
        SubtractParams(**params), particle_image=block, final_map=whole, half_map=half_maps,
        map_pixel_size_angstrom=PIXEL, solvent_mask=parts["mask"] if mask is None else mask,
    )  # fmt: skip


def left(found, truth) -> float:
    """Share of the power of a part that is still there."""
    return float(np.square(found - truth["one"]).sum() / np.square(truth["other"]).sum())


def test_what_is_left_is_the_part_within_the_mask(parts):
    result = subtracted(parts, block_of(parts, parts["one"] + parts["other"]))
    # the second part overlaps the edge of the first, and slices are interpolated: 2 % remain
    assert left(result["particle_image"], parts) < 0.04
    assert result["subtraction_contrast"] == pytest.approx(1.0, abs=0.02)
    shown = np.square(parts["other"]).sum() / np.square(parts["one"] + parts["other"]).sum()
    assert result["subtracted_share"] == pytest.approx(shown, rel=0.25)


def test_the_contrast_of_an_exposure_scales_what_is_subtracted(parts):
    noise = np.random.default_rng(1).normal(0.0, 2.0 * parts["one"].std(), parts["one"].shape)
    for contrast in (0.7, 1.4):
        block = block_of(parts, contrast * (parts["one"] + parts["other"]) + noise)
        result = subtracted(parts, block)
        # 60 particles of a twentieth of the noise's power: a standard error of about 3 %
        assert result["subtraction_contrast"] == pytest.approx(contrast, abs=0.08)
        gone = block.images - result["particle_image"]
        assert float((gone * parts["other"]).sum() / np.square(parts["other"]).sum()) == pytest.approx(contrast, abs=0.12)
    assert subtracted(parts, block, contrast=False)["subtraction_contrast"] == 1.0


def test_halves_are_subtracted_with_their_own_half_map(parts):
    """The odd half-map lacks the second part, so that it is subtracted from the even particles alone."""
    whole, kept = (parts["kept"] + parts["gone"]).numpy(), parts["kept"].numpy()
    images = parts["one"] + parts["other"]
    result = subtracted(parts, block_of(parts, images), np.stack([whole, kept]), contrast=False)
    gone = images - result["particle_image"]
    even, odd = (float(np.square(gone[half::2]).sum() / np.square(parts["other"][half::2]).sum()) for half in (0, 1))
    # the half-maps differ, so their FSC takes some of it
    assert even > 0.4
    assert odd < 0.05


def test_aberrations_are_in_what_is_subtracted(parts):
    """Images with beam tilt, trefoil and magnification: corrected after the subtraction they show the part alone.

    An image and its correction are each other's inverse, so images with aberrations are those whose correction gives the clean ones.
    """
    tilt = {"beam_tilt_x_mrad": 8.0, "beam_tilt_y_mrad": -5.0, "trefoil_x_angstrom3": 15000.0}
    matrix = {"magnification_xx": 1.02, "magnification_xy": 0.005, "magnification_yy": 0.985}
    columns = {name: np.full(COUNT, value) for name, value in {**tilt, **matrix}.items()}
    rotations, shifts = parts["rotations"].float(), torch.from_numpy(parts["origins"]).float()
    given = {**parts["columns"], **columns}

    def shown(volume, own):
        spectra = sub.shown_spectra(sub.slice_volume(volume, 13, BOX), rotations, shifts, own, PIXEL, BOX, 13)
        return torch.fft.fftshift(torch.fft.irfft2(spectra * BOX, s=(BOX, BOX)), dim=(-2, -1)).numpy()

    aberrated = shown(parts["kept"], given)
    back, turned = corrected(aberrated, given, PIXEL)
    clean = shown(parts["kept"], {name: values for name, values in turned.items() if name not in columns})
    # 12 parts in a million are lost where the correction is periodic in the box; without it 8 in a thousand
    assert np.corrcoef(back.ravel(), clean.ravel())[0, 1] > 0.9999
    assert np.corrcoef(aberrated.ravel(), clean.ravel())[0, 1] < 0.995
    both = block_of(parts, shown(parts["kept"] + parts["gone"], given), **columns)
    truth = {"one": aberrated, "other": shown(parts["gone"], given)}
    assert left(subtracted(parts, both)["particle_image"], truth) < 0.06


def test_what_cannot_work_is_refused(parts):
    images = parts["one"] + parts["other"]
    with pytest.raises(MicrographError, match="do not look like the map"):
        subtracted(parts, block_of(parts, -images))
    with pytest.raises(MicrographError, match="1 of 60 particles have no pose"):
        subtracted(parts, block_of(parts, images, rot_deg=np.where(np.arange(COUNT) == 3, np.nan, 0.0)))
    away = np.zeros((BOX,) * 3, np.float32)
    away[1:3, 1:3, 1:3] = 1.0
    with pytest.raises(InputError, match="holds nothing of the map"):
        subtracted(parts, block_of(parts, images), mask=away)
    with pytest.raises(InputError, match="holds the whole molecule"):
        subtracted(parts, block_of(parts, images), mask=np.ones((BOX,) * 3, np.float32))
    with pytest.raises(InputError, match="voxels, the map"):
        subtracted(parts, block_of(parts, images), mask=np.ones((8,) * 3, np.float32))
    nobody = block_of(parts, images)
    nobody = replace(nobody, images=nobody.images[:0], columns={n: v[:0] for n, v in nobody.columns.items()})
    empty = subtracted(parts, nobody)
    assert empty["particle_count"] == 0
    assert math.isnan(empty["subtraction_contrast"])
    assert says(empty) == "no particles"


def written(tmp_path, pipeline, name="p"):
    some = two_states(120)
    whole = inputs_of(some)["final_map"]
    rng = np.random.default_rng(0)
    for half in (1, 2):
        write_mrc(tmp_path / f"half{half}.mrc", whole + 0.02 * whole.std() * rng.standard_normal(whole.shape).astype(np.float32), PIXEL)
    path = write_project(tmp_path, some, pipeline, name)
    text = path.read_text().replace("file: map.mrc", "half_maps: [half1.mrc, half2.mrc]")
    path.write_text(text)
    return some, path


def test_a_run_subtracts_and_the_particles_are_classified(tmp_path, client):
    """The images are stored beside the whole ones, with the same ids and halves, and a 3D classification takes them."""
    classify = {
        "classify3d": {"classes": 2, "resolution_angstrom": 18.0, "restarts": 1, "iterations": 2, "from": {"particles": "subtract"}}
    }
    _, path = written(tmp_path, [{"subtract": {"from": {"mask": "import_mask"}}}, classify])
    project_ = run_plan(make_plan(path), client)
    before, after = (project_.particles(name).load() for name in ("import_particles", "subtract"))
    assert np.array_equal(before["particle_id"], after["particle_id"])
    assert np.array_equal(before["half_set"], after["half_set"])
    change = before["particle_image"].values - after["particle_image"].values
    assert 0.05 < change.std() < 1.0
    assert after["particle_image"].values.std() < before["particle_image"].values.std()
    assert project_.particles("classify3d")["class3d_number"].max() == 2
    export_relion(project_, tmp_path / "relion")
    stacks = [mrcfile.read(path) for path in sorted((tmp_path / "relion").rglob("*.mrcs"))]
    assert any(len(s) == 120 and np.allclose(s, after["particle_image"].values, atol=1e-5) for s in stacks)


def test_whole_images_and_a_second_subtraction_are_asked_for(tmp_path):
    twice = [{"subtract": {"from": {"mask": "import_mask"}}}, {"subtract": {"name": "again", "from": {"mask": "import_mask"}}}]
    _, path = written(tmp_path, twice, "twice")
    with pytest.raises(ProjectFileError, match="subtract"):
        make_plan(path)
    _, path = written(tmp_path, [*twice[:1], {"classify2d": {"classes": 2, "mask_diameter_angstrom": 150.0}}], "flat")
    with pytest.raises(ProjectFileError, match="unsubtracted images"):
        make_plan(path)
