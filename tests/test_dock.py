"""Docking finds pose and hand of a model, says when it cannot, and `hand` mirrors map and poses together."""

import gemmi
import numpy as np
import pytest
import torch
from _particles import blob_map, ctf_columns, project

from cryodask.errors import InputError
from cryodask.kernels import docking as dk
from cryodask.kernels.orientations import euler_to_matrix, matrix_to_euler, random_rotations
from cryodask.stage import Context
from cryodask.stages import _models as md
from cryodask.stages.dock import DockParams, dock
from cryodask.stages.hand import HandParams, hand, mirrored_angles
from cryodask.stages.import_model import ImportModelParams, import_model
from cryodask.stages.model_map import ModelMapParams, model_map

pytestmark = pytest.mark.heavy

BOX, VOXEL = 40, 4.0


def write_model(path, seed=1, count=700, reach=35.0):
    """Carbons in fourteen clumps within a sphere: as uneven as the domains of a protein."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((14, 3))
    centres *= reach * rng.uniform(0.2, 1.0, (14, 1)) ** (1 / 3) / np.linalg.norm(centres, axis=1, keepdims=True)
    out = centres[rng.integers(0, 14, count)] + 0.14 * reach * rng.standard_normal((count, 3))
    structure, model, chain = gemmi.Structure(), gemmi.Model(1), gemmi.Chain("A")
    for i, xyz in enumerate(out + 50.0):
        residue, atom = gemmi.Residue(), gemmi.Atom()
        residue.name, residue.seqid = "GLY", gemmi.SeqId(str(i + 1))
        atom.name, atom.element, atom.pos, atom.occ, atom.b_iso = "CA", gemmi.Element("C"), gemmi.Position(*xyz), 1.0, 30.0
        residue.add_atom(atom)
        chain.add_residue(residue)
    model.add_chain(chain)
    structure.add_model(model)
    structure.make_mmcif_document().write_file(str(path))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("model") / "m.cif")
    with Context() as context:
        return import_model.process(ImportModelParams(file=path), context=context)["model_file"]


@pytest.fixture(scope="module")
def placed(model):
    """A noisy map of the model in a random place, and the true coordinates."""
    atoms = md.atoms_of(md.structure_of(model))
    turn = random_rotations(1, torch.Generator().manual_seed(5))[0].double().numpy()
    true = (atoms.positions - atoms.positions.mean(0)) @ turn.T + np.array([6.0, -5.0, 3.0])
    volume = md.density(atoms, true, BOX, VOXEL, 60.0)
    noise = np.random.default_rng(0).standard_normal(volume.shape).astype(np.float32)
    return volume + 0.2 * volume.std() * noise, true + BOX // 2 * VOXEL


def docked(volume, model, **params):
    return dock.process(DockParams(**params), final_map=volume, map_pixel_size_angstrom=VOXEL, model_file=model, resolution_angstrom=8.5)


def test_a_model_is_placed_and_the_hand_is_right(model, placed):
    volume, true = placed
    result = docked(volume, model)
    assert result["dock_hand"] == "right"
    found = md.atoms_of(md.structure_of(result["model_file"])).positions
    assert np.sqrt(((found - true) ** 2).sum(1).mean()) < 1.0
    assert "correct hand" in dock.says(result)


def test_a_mirrored_map_is_recognised(model, placed):
    volume, _ = placed
    result = docked(dk.mirrored(torch.from_numpy(volume)).numpy(), model)
    assert result["dock_hand"] == "mirrored"
    assert "wrong hand" in dock.says(result)


def test_another_molecule_and_a_coarse_map_give_no_hand(placed, tmp_path, model):
    volume, _ = placed
    other = md.read_model(write_model(tmp_path / "o.cif", seed=9))
    assert docked(volume, other)["dock_hand"] == "unknown"
    assert dk.decided_hand(0.8, 0.1, 15.0) == "unknown"
    large = md.read_model(write_model(tmp_path / "l.cif", reach=400.0))
    with pytest.raises(InputError, match="does not fit into a map"):
        docked(volume, large)


def test_a_map_moved_and_moved_back_is_the_map():
    volume = blob_map(32, width_px=2.0)
    rotation = random_rotations(1, torch.Generator().manual_seed(2))[0].double()
    shift = torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64)
    back = dk.moved_map(dk.moved_map(volume, rotation, shift), rotation.T, -(rotation @ shift))
    inside = volume > 0.2 * volume.max()
    assert float((back - volume)[inside].abs().max()) < 0.1 * float(volume.max())


def test_mirrored_poses_show_the_same_images_of_the_mirrored_map():
    volume = blob_map(32, blobs=9)
    rotations = random_rotations(4, torch.Generator().manual_seed(0))
    angles = [np.degrees(a.numpy()) for a in matrix_to_euler(rotations.double())]
    turned = euler_to_matrix(*(torch.deg2rad(torch.from_numpy(a).double()) for a in mirrored_angles(*angles)))
    columns, nowhere = ctf_columns(4), torch.zeros(4, 2)
    before = project(volume, rotations, nowhere, columns, 4.0)
    after = project(dk.mirrored(volume), turned.float(), nowhere, columns, 4.0)
    assert np.abs(before - after).max() < 0.02 * before.std()


def test_hand_flips_or_passes_on_as_the_docked_model_says():
    halves = np.random.default_rng(0).standard_normal((2, 8, 8, 8)).astype(np.float32)
    given = {"final_map": halves.mean(0), "half_map": halves, "map_pixel_size_angstrom": 2.0}
    flipped = hand.process(HandParams(), dock_hand="mirrored", **given)
    assert np.array_equal(flipped["final_map"][1:], halves.mean(0)[:0:-1])
    assert np.array_equal(hand.process(HandParams(flip=True), **flipped)["half_map"], halves)
    assert np.array_equal(hand.process(HandParams(), dock_hand="right", **given)["half_map"], halves)
    for unknown in ({}, {"dock_hand": "unknown"}):
        with pytest.raises(InputError, match="hand of the map is unknown"):
            hand.process(HandParams(), **unknown, **given)


def test_residues_out_of_place_have_a_low_correlation(model):
    structure = md.structure_of(model)
    atoms = md.atoms_of(structure)
    box, voxel = 48, 3.0
    shift = box // 2 * voxel - atoms.positions.mean(0)
    volume = md.density(atoms, atoms.positions - atoms.positions.mean(0), box, voxel, 60.0)
    right = md.moved_file(model, np.eye(3), shift)
    given = {"final_map": volume, "map_pixel_size_angstrom": voxel}
    good = model_map.process(ModelMapParams(), model_file=right, **given)
    assert good["model_resolution_angstrom"] < 7.0
    assert np.median(good["residue_correlation"]) > 0.9
    wrong = md.structure_of(right)
    for number, residue in enumerate(wrong[0][0]):
        if number < 60:
            residue[0].pos = gemmi.Position(*(np.array(residue[0].pos.tolist()) + np.array([20.0, -15.0, 18.0])))
    bad = model_map.process(ModelMapParams(), model_file=md.bytes_of(wrong), **given)["residue_correlation"]
    assert np.median(bad[:60]) < 0.5 < np.median(bad[60:])
    with pytest.raises(InputError, match="lies outside the map"):
        model_map.process(ModelMapParams(), model_file=md.moved_file(model, np.eye(3), shift + 400.0), **given)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "bad.cif").write_text("hello")
    with pytest.raises(InputError):
        md.read_model(str(tmp_path / "bad.cif"))
