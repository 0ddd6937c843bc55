"""Regions without particles: what is left out, and what never is."""

import mrcfile
import numpy as np
import pytest
import torch
import xarray as xr
from scipy import ndimage

from cryodask.kernels.contamination import unusual_regions
from cryodask.kernels.picking import pick_particles
from cryodask.simulate import Optics, simulate_micrograph
from cryodask.simulate.model import MOLECULES, Molecule
from cryodask.stages.pick import PickParams, pick
from cryodask.store.births import accepted

PIXEL, SIZE = 1.77, 1024


def end_to_end():
    """Two molecules of beta-galactosidase, 290 x 130 Angstrom."""
    one = MOLECULES["beta-galactosidase"]().positions
    axis = int(np.argmax(np.ptp(np.concatenate(list(one.values())), axis=0)))
    shift = 55.0 * np.eye(3)[axis]
    return Molecule({e: np.concatenate([p - shift, p + shift]) for e, p in one.items()})


def field(seed, defocus, **scene):
    optics = Optics(pixel_size_angstrom=PIXEL, defocus_u_angstrom=defocus, defocus_v_angstrom=defocus)
    return simulate_micrograph(shape=(SIZE, SIZE), optics=optics, seed=seed, **{"signal_amplitude": 0.7, **scene}).image


@pytest.fixture(scope="module")
def scenes():
    MOLECULES["end to end"] = end_to_end
    try:
        return {
            "crowded, near focus": field(50, 4000, particles=200, distance_angstrom=135.0),
            "crowded, far from focus": field(60, 25000, particles=200, distance_angstrom=135.0),
            "twice the contrast, 3 um": field(12, 30000, particles=13, signal_amplitude=1.4),
            "one of them": field(13, 25000, particles=1, signal_amplitude=1.4),
            "elongated": field(201, 12000, particles=20, distance_angstrom=300.0, molecule="end to end"),
            "ice": field(11, 12000, particles=0),
        }
    finally:
        del MOLECULES["end to end"]


def picked(image, diameter=180.0, pixel=PIXEL, **params):
    out = pick.process(PickParams(diameter_angstrom=diameter, **params), micrograph_dw=image, pixel_size_angstrom=pixel)
    return out, np.stack([out["pick_y"], out["pick_x"]], 1)[accepted(out["pick_score"], out["pick_threshold"])]


def test_particles_are_never_left_out(scenes):
    """Nor where half of the micrograph is empty, or the beam 40 % brighter on one side."""
    crowded, ice = scenes["crowded, far from focus"], scenes["ice"]
    half = np.where(np.arange(SIZE) < SIZE // 2, crowded, ice)
    strong = np.where(np.arange(SIZE) < SIZE // 2, scenes["twice the contrast, 3 um"], ice)
    sloped = crowded * np.linspace(0.8, 1.2, SIZE, dtype=np.float32)
    for name, image in {**scenes, "half": half, "half, strong": strong, "sloped": sloped, "bright particles": -crowded}.items():
        mask = pick_particles(torch.from_numpy(image), 180 / PIXEL, rounds=1, pixel_size_angstrom=PIXEL).mask
        assert not mask.any(), name


@pytest.mark.parametrize("share", [0.25, 0.7])
def test_carbon_is_left_out_and_the_ice_is_not(scenes, share):
    """A film that absorbs 8 % and has a texture of its own, on less and on more than half of the micrograph; its edge is oblique."""
    y, x = np.mgrid[:SIZE, :SIZE]
    carbon = x + 0.3 * (y - SIZE / 2) < share * SIZE
    texture = np.random.default_rng(0).standard_normal((SIZE, SIZE)).astype(np.float32)
    texture = ndimage.gaussian_filter(texture, 1.2) - ndimage.gaussian_filter(texture, 6.0)
    image = scenes["crowded, near focus"]
    image = np.where(carbon, 0.92 * image + 0.6 * image.std() / texture.std() * texture, image).astype(np.float32)
    found = pick_particles(torch.from_numpy(image), 180 / PIXEL, rounds=1, pixel_size_angstrom=PIXEL)
    mask = ndimage.zoom(found.mask.numpy().astype(np.float32), SIZE / np.array(found.mask.shape), order=1) > 0.5
    assert (mask & carbon).sum() > 0.98 * carbon.sum()
    assert (mask & ~carbon).sum() < 0.1 * (~carbon).sum()
    beyond = ndimage.distance_transform_edt(~mask)[found.y.long().clamp(0, SIZE - 1), found.x.long().clamp(0, SIZE - 1)]
    assert beyond.min() > 0.4 * 180 / PIXEL  # half a diameter, to a pixel of the reduced image
    assert len(found.y) > 10


def test_a_weak_step_of_the_ice_is_left_alone(scenes):
    """Ice that is 2 % darker on one side: 1.3 spreads."""
    image = scenes["crowded, near focus"] * np.where(np.arange(SIZE) < SIZE // 3, 0.98, 1.0).astype(np.float32)
    assert not pick_particles(torch.from_numpy(image), 180 / PIXEL, rounds=1, pixel_size_angstrom=PIXEL).mask.any()


@pytest.fixture(scope="module")
def contaminated(shared):
    """A reduced micrograph with a contaminant on 13 % of it, as far as it is dark, and RELION's 45 picks on it."""
    folder = shared / "data/micrographs"
    image = mrcfile.read(folder / "contaminated_Ucsf_1142.mrc.bz2").astype(np.float32)
    spread = 1.4826 * np.median(np.abs(image - np.median(image)))
    parts, _ = ndimage.label(ndimage.gaussian_filter(image, 3.0) < np.median(image) - 2.5 * spread)
    outline = ndimage.binary_fill_holes(parts == np.bincount(parts.reshape(-1))[1:].argmax() + 1)
    rows = (line.split() for line in (folder / "contaminated_Ucsf_1142_autopick.star").read_text().splitlines())
    places = np.array([(float(r[1]), float(r[0])) for r in rows if len(r) == 5])
    return image, outline, places


@pytest.mark.parametrize(("diameter", "overlap"), [(30, 0.84), (50, 0.78)])
def test_the_contaminant_of_a_real_micrograph_is_found(contaminated, diameter, overlap):
    """Measured: intersection over union 0.86 and 0.80, all of the outline covered, 2.5 and 3.8 % of the rest."""
    image, outline, places = contaminated
    found = pick_particles(torch.from_numpy(image), diameter, pixel_size_angstrom=4.0)
    mask = ndimage.zoom(found.mask.numpy().astype(np.float32), np.array(image.shape) / found.mask.shape, order=1) > 0.5
    assert (mask & outline).sum() > 0.99 * outline.sum()
    assert (mask & outline).sum() / (mask | outline).sum() > overlap
    assert (mask & ~outline).sum() < 0.045 * (~outline).sum()
    # 12 of these 45 are in the mask of MicrographCleaner, a trained network (Sanchez-Garcia et al. 2020)
    assert 12 <= mask[tuple(places.astype(int).T)].sum() <= 15


def test_the_step_says_what_it_has_left_out(contaminated):
    image, outline, _ = contaminated
    out, found = picked(image, 200.0, 4.0)
    everywhere, before = picked(image, 200.0, 4.0, exclude_regions=False)
    assert everywhere["excluded_share"] == everywhere["pick_excluded_count"] == everywhere["excluded_regions"].sum() == 0
    assert out["excluded_share"] == pytest.approx(0.168, abs=0.02)
    assert out["excluded_regions"].shape == (32, 32)
    assert out["excluded_regions"].mean() == pytest.approx(out["excluded_share"], abs=0.02)
    assert out["pick_excluded_count"] >= 1
    assert outline[tuple(before.astype(int).T)].sum() >= 2  # it has picked the contaminant
    assert not outline[tuple(found.astype(int).T)].any()


def test_both_contaminants_among_apoferritin_are_found(shared):
    image = mrcfile.read(shared / "data/micrographs/apoferritin_10146_030502.mrc.bz2").astype(np.float32)
    found = pick_particles(torch.from_numpy(image), 72.0, rounds=1, pixel_size_angstrom=1.5)
    parts, count = ndimage.label(found.mask.numpy())
    assert count == 2
    scale = 1200 / found.mask.shape[0]
    for centre in ndimage.center_of_mass(parts > 0, parts, (1, 2)):
        # seen by eye at the left edge, and on the right
        assert min(np.hypot(centre[0] * scale - y, centre[1] * scale - x) for y, x in ((270, 30), (785, 1090))) < 40
    assert float(found.mask.float().mean()) < 0.02


def test_a_flat_image_has_no_regions():
    assert not unusual_regions(torch.zeros(64, 70), 16.0, 180.0).any()


def test_a_micrograph_of_nothing_but_carbon_is_not_refused():
    """One region on all of it cannot be told from ice; a hole on most of it leaves hardly a place, and no crash."""
    rng = np.random.default_rng(0)
    image = rng.normal(100.0, 10.0, (600, 600)).astype(np.float32)
    image[:, 60:] += 4000.0
    out, found = picked(image)
    assert len(found) == 0 or out["excluded_share"] < 1.0
    assert np.isfinite(out["pick_threshold"])


def test_the_report_shows_where_nothing_was_picked(contaminated, scenes):
    image, _, _ = contaminated
    made = [picked(image, 200.0, 4.0)[0], picked(scenes["ice"][: image.shape[0], : image.shape[1]], 200.0, 4.0)[0]]
    slots = max(len(one["pick_y"]) for one in made)
    columns = {}
    for name in made[0]:
        ragged = name in ("pick_y", "pick_x", "pick_score")
        values = [np.pad(one[name], (0, slots - len(one[name])), constant_values=np.nan) if ragged else one[name] for one in made]
        inner = ("slot",) if ragged else {"pick_profile": ("radius",), "excluded_regions": ("cell_y", "cell_x")}.get(name, ())
        columns[name] = (("micrograph", *inner), np.stack([np.asarray(v) for v in values]))
    ds = xr.Dataset(columns, {"micrograph": ["dirty", "clean"]})
    good = (ds["pick_score"] > ds["pick_threshold"]).astype(np.int8)
    ds = ds.assign(pick_accepted=good, pick_count=good.sum("slot"))
    ds["micrograph_dw"] = (("micrograph", "y", "x"), np.stack([image, scenes["ice"][: image.shape[0], : image.shape[1]]]))
    first, second = pick.draw(ds)
    assert "in 1 micrographs (at most 17%)" in first.caption
    assert "largest excluded regions" in second.caption
    assert any("16.8% excluded" in axes.get_title() for axes in second.figure.axes)
