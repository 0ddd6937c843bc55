"""A model in its map: which residues, helices and strands fit, and what is said of models for which a figure would mean nothing."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
import torch
import xarray as xr
from _peptide import atom, bundle, density_of

from cryodask.errors import InputError
from cryodask.kernels.fsc import half_radius
from cryodask.stages import _models as md
from cryodask.stages._model_parts import parts_of, secondary_structure
from cryodask.stages.model_map import ModelMapParams, model_map
from cryodask.vocabulary import VARIABLES

BOX, VOXEL, RESOLUTION = 64, 1.0, 3.0
DISPLACED = ("C", range(5, 17))


@pytest.fixture(scope="module")
def structure() -> gemmi.Structure:
    return bundle()


@pytest.fixture(scope="module")
def volume(structure) -> np.ndarray:
    """Density to 3 A, in noise of the same spectrum and a third of its standard deviation in the molecule."""
    spectrum = torch.fft.rfftn(torch.from_numpy(density_of(structure, BOX, VOXEL, 40.0)))
    noise = torch.fft.rfftn(torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(0)))
    radius = half_radius(BOX)
    keep = radius < BOX * VOXEL / RESOLUTION
    fall = torch.exp(-10.0 * (radius / (BOX * VOXEL)) ** 2) * keep
    clean, rough = (torch.fft.irfftn(f, s=(BOX,) * 3) for f in (spectrum * keep, noise * fall))
    return (clean + rough * float(0.33 * clean[clean > clean.std()].std() / rough.std())).numpy()


def compared(volume, structure, **more):
    params = more.pop("params", ModelMapParams())
    given = {"final_map": volume, "map_pixel_size_angstrom": VOXEL, "model_file": md.bytes_of(structure.clone())}
    return model_map.process(params, **given, **{"resolution_angstrom": RESOLUTION, **more})


@pytest.fixture(scope="module")
def good(volume, structure):
    return compared(volume, structure)


def auc(right: np.ndarray, wrong: np.ndarray) -> float:
    """Probability that a right residue has a higher score than a wrong one."""
    return float((right[:, None] > wrong[None]).mean())


def drawn(result) -> list:
    """The pictures of a result."""
    ds = xr.Dataset({name: (VARIABLES[name].dims, np.asarray(value)) for name, value in result.items()})
    pictures = list(model_map.draw(ds))
    for picture in pictures:
        picture.figure.canvas.draw()
    return pictures


def test_a_model_in_its_own_map(good):
    assert good["model_resolution_angstrom"] < 3.3
    assert np.median(good["residue_correlation"]) > 0.9
    # measured 0.69 of 0.74: noise costs the difference
    assert 0.6 < good["residue_q"].mean() < good["residue_q_expected"].mean() < 0.85
    assert good["atom_q"].shape == good["atom_residue"].shape == (5 * len(good["residue_q"]),)
    assert model_map.says(good).endswith("if the map agreed with the model)")


def test_without_noise_the_expected_score_is_the_score(structure):
    clean = density_of(structure, BOX, VOXEL, 100.0)
    result = compared(clean, structure, resolution_angstrom=2.0)
    assert np.abs(result["residue_q"] - result["residue_q_expected"]).max() < 0.03


def test_residues_out_of_place_are_found(volume, structure, good):
    moved = structure.clone()
    for residue in moved[0][DISPLACED[0]]:
        for one in residue if residue.seqid.num in DISPLACED[1] else ():
            one.pos = gemmi.Position(*(np.array(one.pos.tolist()) + np.array([1.2, -1.1, 1.2])))
    result = compared(volume, moved)
    wrong = np.array([name.split()[0] == DISPLACED[0] and int(name.split()[2]) in DISPLACED[1] for name in result["residue_name"]])
    assert wrong.sum() == len(DISPLACED[1])
    assert auc(result["residue_q"][~wrong], result["residue_q"][wrong]) > 0.97
    element = list(result["element_name"]).index(next(n for n in result["element_name"] if n.startswith("C ")))
    assert result["element_q"][element] == result["element_q"].min() < good["element_q"][element] - 0.3


def test_a_model_shifted_by_a_residue_scores_near_zero(volume, structure):
    moved = structure.clone()
    moved[0].transform_pos_and_adp(gemmi.Transform(gemmi.Mat33(), gemmi.Vec3(3.1, -2.3, 2.9)))
    assert abs(compared(volume, moved)["residue_q"].mean()) < 0.25


def test_the_sharpened_map_is_scored_where_there_is_one(volume, structure, good):
    result = compared(np.roll(volume, 9, 0), structure, sharpened_map=volume)
    assert (result["q_map"], good["q_map"]) == ("sharpened", "unsharpened")
    assert result["residue_q"].mean() == pytest.approx(good["residue_q"].mean(), abs=1e-6)


# --- helices and strands -----------------------------------------------------------------------------------------------------------
def test_helices_and_strands_of_the_backbone(good):
    assert list(good["element_kind"]) == ["helix"] * 3 + ["strand"] * 2
    assert [name[0] for name in good["element_name"]] == list("ABCDE")
    assert good["element_source"] == "CA atoms"
    first, last = good["element_first"], good["element_last"]
    assert good["element_q"][0] == pytest.approx(good["residue_q"][first[0] : last[0] + 1].mean(), abs=1e-6)


def test_records_of_the_file_are_taken_where_a_chain_has_them(structure, tmp_path):
    structure.write_pdb(str(tmp_path / "m.pdb"))
    record = "HELIX    1   1 ALA A    3  ALA A   12  1                                  10          "
    (tmp_path / "m.pdb").write_text(record + "\n" + (tmp_path / "m.pdb").read_text())
    read = md.structure_of(md.read_model(str(tmp_path / "m.pdb")))
    elements, source = secondary_structure(read, parts_of(read))
    assert (elements[0].kind, elements[0].first, elements[0].last, source) == ("helix", 2, 12, "both")


# --- models of all kinds -----------------------------------------------------------------------------------------------------------
def test_hydrogens_waters_and_second_conformations_are_counted_and_left_out(volume, structure, good):
    full = structure.clone()
    chain = full[0]["A"]
    for place in (1, 2):
        other = chain[place]["CA"][0].clone()
        chain[place]["CA"][0].altloc = "A"
        other.altloc, other.pos = "B", gemmi.Position(*(np.array(other.pos.tolist()) + 1.0))
        chain[place].add_atom(other)
    chain[4].add_atom(atom("HA", "H", np.array([30.0, 30.0, 30.0])))
    solvent = gemmi.Chain("W")
    for number in range(2000):
        water = gemmi.Residue()
        water.name, water.seqid = "HOH", gemmi.SeqId(number + 1, " ")
        water.add_atom(atom("O", "O", np.random.default_rng(number).uniform(5, 55, 3)))
        solvent.add_residue(water)
    ligand = gemmi.Residue()
    ligand.name, ligand.seqid = "ZN", gemmi.SeqId(2001, " ")
    ligand.add_atom(atom("ZN", "Zn", np.array([20.0, 20.0, 20.0])))
    solvent.add_residue(ligand)
    full[0].add_chain(solvent)
    result = compared(volume, full)
    assert (result["waters_left_out"], result["hydrogens_left_out"], result["alternates_left_out"]) == (2000, 1, 2)
    assert result["residue_kind"][-1] == "other"
    assert np.allclose(result["residue_q"][:-1], good["residue_q"], atol=0.01)
    pictures = drawn(result)
    assert "Left out: 2000 waters, 1 hydrogens, 2 atoms of further conformations." in pictures[0].caption
    assert [p.title for p in pictures] == ["Model and map", "Along the chains", "Helices and strands"]


def test_the_same_model_as_a_pdb_file_has_the_same_scores(volume, structure, good, tmp_path):
    structure.write_pdb(str(tmp_path / "m.pdb"))
    read = md.structure_of(md.read_model(str(tmp_path / "m.pdb")))
    # PDB files have three decimals
    assert np.allclose(compared(volume, read)["residue_q"], good["residue_q"], atol=0.01)


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        (None, {"resolution_angstrom": 7.0}, "no Q-scores: at 7.0 A atoms are not resolved"),
        ("CA", {}, "no Q-scores: the model has one atom per residue"),
        (None, {"params": ModelMapParams(resolution_angstrom=6.1)}, "no Q-scores: at 6.1 A"),
    ],
)
def test_no_figure_is_given_where_it_would_mean_nothing(volume, structure, change, more, said):
    model = structure.clone()
    if change:
        for chain in model[0]:
            for residue in chain:
                for name in ("N", "C", "O", "CB"):
                    residue.remove_atom(name, "\0")
    result = compared(volume, model, **more)
    assert np.isnan(result["residue_q"]).all()
    assert np.isnan(result["element_q"]).all()
    assert said in model_map.says(result)
    assert said[:11] in drawn(result)[1].caption.replace("No Q", "no Q")


def test_without_the_resolution_of_half_maps_that_of_the_model_decides(volume, structure):
    result = compared(volume, structure, resolution_angstrom=float("nan"))
    assert result["q_resolution_angstrom"] == result["model_resolution_angstrom"]
    assert result["q_missing"] == ""
    other = bundle(2, 3, residues=12, spacing=9.0)
    result = compared(volume, other, resolution_angstrom=None)
    assert "no Q-scores" in model_map.says(result)


def test_nucleotides_are_residues_too(volume, structure):
    model = structure.clone()
    for residue in model[0]["A"]:
        residue.name = "G"
    result = compared(volume, model)
    assert list(result["residue_kind"][:18]) == ["nucleic acid"] * 18
    assert not any(name.startswith("A ") for name in result["element_name"])
    assert len(drawn(result)) == 3


def test_a_model_that_was_docked_in_the_mirror_image_is_refused_with_the_way_out(volume, structure):
    with pytest.raises(InputError, match=r"map has the wrong hand(?s:.*)- hand: \{from: \{model: dock\}\}"):
        compared(volume, structure, dock_hand="mirrored")
    assert compared(volume, structure, dock_hand="unknown")["q_missing"] == ""


def test_another_molecule_does_not_fit(volume):
    """Its residues have correlations and Q-scores near zero, and the report says so."""
    other = bundle(1, 4, residues=14, spacing=9.0)
    other[0].transform_pos_and_adp(gemmi.Transform(gemmi.Mat33([[0, 1, 0], [0, 0, 1], [1, 0, 0]]), gemmi.Vec3(0, 0, 0)))
    result = compared(volume, other)
    assert np.median(result["residue_correlation"]) < 0.5
    assert abs(result["residue_q"].mean()) < 0.25 < result["residue_q_expected"].mean()
    assert "of the residues do not fit" in model_map.says(result)


def test_a_model_elsewhere_and_an_empty_map_are_refused(volume, structure):
    far = structure.clone()
    far[0].transform_pos_and_adp(gemmi.Transform(gemmi.Mat33(), gemmi.Vec3(100, 0, 0)))
    with pytest.raises(InputError, match="lies outside the map"):
        compared(volume, far)
    for empty in (np.zeros_like(volume), np.full_like(volume, np.nan)):
        with pytest.raises(InputError, match="map is empty or contains NaN"):
            compared(empty, structure)


CIF = """data_x
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_seq_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.auth_asym_id
_atom_site.auth_seq_id
_atom_site.occupancy
_atom_site.B_iso_or_equiv
"""
ATOM = "ATOM {0} C CA . ALA A {0} {1} A {0} 1 20\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read as a model"),
        ("data_x\n_cell.length_a 10\n", "has no atoms"),
        ("HETATM    1  O   HOH A   1      10.000  10.000  10.000  1.00 20.00           O  \n" * 3000, "has only 0 atoms"),
        (CIF + "".join(ATOM.format(i, f"{3 * i} 0 0") for i in range(1, 40)), "has only 39 atoms"),
        (CIF + "".join(ATOM.format(i, "1 2 3") for i in range(1, 80)), "are in one place"),
        (CIF + "".join(ATOM.format(i, "? 2 3" if i == 7 else f"{i} 0 0") for i in range(1, 80)), "has atoms without coordinates"),
    ],
)
def test_files_without_a_model_are_refused(tmp_path, text, said):
    path = tmp_path / ("m.pdb" if text.startswith("HETATM") else "m.cif")
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        md.read_model(str(path))


def test_a_model_of_crystal_symmetry_p1_is_taken_as_it_is(tmp_path):
    text = "_cell.length_a 40\n_cell.length_b 40\n_cell.length_c 40\n_cell.angle_alpha 90\n_cell.angle_beta 90\n_cell.angle_gamma 90\n"
    text += "_symmetry.space_group_name_H-M 'P 1'\n"
    (tmp_path / "m.cif").write_text(CIF.replace("loop_", text + "loop_", 1) + "".join(ATOM.format(i, f"{i} 0 0") for i in range(1, 80)))
    assert len(md.atoms_of(md.structure_of(md.read_model(str(tmp_path / "m.cif")))).elements) == 79
