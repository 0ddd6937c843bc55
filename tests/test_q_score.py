"""Q-scores of densities for which they are known, and secondary structure of chains that were built with it."""

from __future__ import annotations

import numpy as np
import pytest
from _peptide import HELIX, STRAND, bundle, chain_of, density_of

from cryodask.kernels.q_score import own_reach, q_scores, spread_directions
from cryodask.kernels.secondary_structure import runs, structure_of_chain
from cryodask.stages import _models as md

VOXEL = 0.4


def gaussians(places: np.ndarray, sd: float, box: int = 40) -> np.ndarray:
    z, y, x = np.indices((box,) * 3) * VOXEL
    return sum(np.exp(-((x - p[0]) ** 2 + (y - p[1]) ** 2 + (z - p[2]) ** 2) / (2 * sd**2)) for p in places)


# correlation of exp(-r^2 / 0.72) and exp(-r^2 / (2 sd^2)) at r = 0, 0.1, ... 2.0
@pytest.mark.parametrize(("sd", "expected"), [(0.6, 1.0), (0.8, 0.9833), (1.0, 0.9576), (1.4, 0.9208)])
def test_an_isolated_gaussian_has_the_correlation_of_two_curves(sd, expected):
    place = np.array([[7.9, 8.1, 8.05]])
    assert q_scores(gaussians(place, sd), VOXEL, place)[0] == pytest.approx(expected, abs=0.004)


def test_density_of_opposite_sign_and_none_at_all():
    place = np.array([[7.9, 8.1, 8.05]])
    assert q_scores(-gaussians(place, 0.6), VOXEL, place)[0] == pytest.approx(-1.0, abs=0.004)
    assert q_scores(np.ones((40, 40, 40)), VOXEL, place)[0] == 0.0
    assert np.isnan(q_scores(np.ones((20, 20, 20)), VOXEL, np.array([[9.0, 2.0, 2.0]]))[0])


def test_points_belong_to_the_nearest_atom():
    """Between atoms 1.5 A apart the cell ends after 0.75 A, at 60 degrees after 1.5 A, and sideways it does not end."""
    ways = np.array([[1.0, 0, 0], [0.5, np.sqrt(0.75), 0], [0, 1.0, 0], [-1.0, 0, 0]])
    reach = own_reach(np.array([[0.0, 0, 0], [1.5, 0, 0], [30.0, 0, 0]]), ways)
    assert np.allclose(reach[0], [0.75, 1.5, np.inf, np.inf])
    assert np.allclose(reach[1], [np.inf, np.inf, np.inf, 0.75])
    assert np.isinf(reach[2]).all()
    # so a neighbour hardly matters: without the cells the Q-score of this pair would be below 0.6
    pair = np.array([[7.2, 8.0, 8.0], [8.7, 8.0, 8.0]])
    assert q_scores(gaussians(pair, 0.45), VOXEL, pair).min() > 0.93


def test_the_first_directions_are_spread():
    eight = spread_directions()[:8]
    assert (eight @ eight.T - 2 * np.eye(8)).max() < np.cos(np.radians(50))


def test_an_atom_in_the_place_of_another_and_a_single_one():
    places = np.array([[8.0, 8.0, 8.0], [8.0, 8.0, 8.0]])
    both = q_scores(gaussians(places[:1], 0.6), VOXEL, places)
    assert both[0] == both[1] == q_scores(gaussians(places[:1], 0.6), VOXEL, places[:1])[0]
    assert q_scores(np.ones((4, 4, 4)), 1.0, np.zeros((0, 3))).shape == (0,)


def test_atoms_anywhere_score_near_zero():
    structure = bundle()
    volume = density_of(structure, 64, 1.0, 30.0)
    right = md.atoms_of(structure).positions
    anywhere = np.random.default_rng(0).uniform(16, 48, right.shape)
    assert q_scores(volume, 1.0, right).mean() > 0.75
    assert abs(q_scores(volume, 1.0, anywhere).mean()) < 0.15


# --- helices and strands -------------------------------------------------------------------------------------------------------------
def guides(turns: list[tuple[float, float]]) -> np.ndarray:
    return np.array([r["CA"][0].pos.tolist() for r in chain_of("A", turns)])


def test_helices_and_strands_that_were_built_are_found():
    coil = (70.0, 160.0)
    turns = [HELIX] * 14 + [coil] * 3 + [STRAND] * 10 + [coil] * 3 + [HELIX] * 9
    kinds = structure_of_chain(guides(turns))
    found = [(str(kinds[a]), a, b) for a, b in runs(kinds) if kinds[a]]
    assert [kind for kind, _, _ in found] == ["helix", "strand", "helix"]
    for (_, first, last), (begin, end) in zip(found, [(0, 14), (17, 27), (30, 39)]):
        # P-SEA leaves out up to two residues at an end
        assert abs(first - begin) <= 2
        assert abs(last - end) <= 2


def test_a_left_handed_helix_a_broken_chain_and_short_pieces():
    # distances are those of a helix of either hand: the rule by distances finds it, as Labesse et al. intend
    places = guides([HELIX] * 12)
    broken = places.copy()
    broken[6] = np.nan
    assert (structure_of_chain(places) == "helix").sum() >= 9
    assert structure_of_chain(broken)[6] == ""
    assert (structure_of_chain(places[:4]) == "").all()
    assert structure_of_chain(np.zeros((0, 3))).shape == (0,)
    assert (structure_of_chain(np.random.default_rng(0).uniform(0, 30, (30, 3))) == "").all()
