"""Birth tables are append-only: ids and halves of what is found again stay, whatever the reason for which particles are born again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _told import Told
from hypothesis import given, settings
from hypothesis import strategies as st
from test_counts import here, run, session  # noqa: F401

from cryodask.formats.star import write_coordinates
from cryodask.run.imports import row_messages
from cryodask.stages.edit_picks import EditPicksParams, edit_picks
from cryodask.store.births import Birth, born, known_of, with_ids
from cryodask.store.claims import birth_marks
from cryodask.store.identity import birth_of, copy_of, make_ids, number_of, parent_of

ROW = 5
BIRTH = Birth(3, seed=1)
NAMES = st.lists(st.integers(0, 12), max_size=14)
PLACES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=14)


def of_names(names: list[int]) -> dict[str, Any]:
    """Particles with names, at places that say nothing."""
    zeros = np.zeros(len(names), np.float32)
    return {"pick_y": zeros, "pick_x": zeros, "natural_key": np.array(names, np.int64), "placed": False}


def of_places(places: list[tuple[int, int]], score: float = 1.0) -> dict[str, Any]:
    y, x = (np.array([10.0 * p[i] for p in places], np.float32) for i in (0, 1))
    return {"pick_y": y, "pick_x": x, "pick_score": np.full(len(places), score, np.float32)}


@given(st.lists(NAMES, min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_a_name_keeps_its_id_and_its_half_for_ever(files: list[list[int]]) -> None:
    table, ids, halves = None, {}, {}
    for names in files:
        table = born(BIRTH, ROW, of_names(names), table)
        alive = np.isfinite(table["pick_score"])
        assert sorted(table["natural_key"][alive].tolist()) == sorted(set(names)), "each particle once"
        assert len(np.unique(table["particle_id"])) == len(table["particle_id"])
        for key, one, half in zip(*(table[n].tolist() for n in ("natural_key", "particle_id", "particle_half"))):
            assert ids.setdefault(key, one) == one
            assert halves.setdefault(one, half) == half
        assert set(table["particle_id"].tolist()) == set(ids.values()), "nobody is forgotten"
    assert len(set(ids.values())) == len(ids), "no id is dealt twice"


@given(st.lists(PLACES, min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_a_place_keeps_its_id_and_its_half_for_ever(files: list[list[tuple[int, int]]], random: Any) -> None:
    tables: list[tuple[dict[str, Any], bool]] = []
    ids: dict[tuple[int, int], int] = {}
    halves: dict[int, int] = {}
    for places in files:
        found = of_places(places, score=random.random())
        found["pick_y"] = found["pick_y"] + np.float32(random.uniform(-0.4, 0.4))
        if random.random() < 0.3 and tables:  # an older result counts again: what came after it is not forgotten
            tables.append(random.choice(tables))
        table = born(BIRTH, ROW, found, known_of(tables))
        tables.append((table, True))
        alive = np.isfinite(table["pick_score"])
        where = np.round(np.stack([table["pick_y"], table["pick_x"]], 1) / 10).astype(int)
        assert sorted(map(tuple, where[alive].tolist())) == sorted(set(places))
        for place, one, half in zip(map(tuple, where.tolist()), table["particle_id"].tolist(), table["particle_half"].tolist()):
            assert ids.setdefault(place, one) == one
            assert halves.setdefault(one, half) == half
        assert len(np.unique(table["particle_id"])) == len(table["particle_id"])
    assert len(set(ids.values())) == len(ids)


@given(PLACES, PLACES, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_ids_that_come_back_are_believed_with_their_place_only(mine: list[Any], there: list[Any], seed: int) -> None:
    own = born(Birth(1), ROW, of_places(mine), None)
    other = born(Birth(1), ROW, of_places(there), None)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(other["particle_id"]))
    file = {n: other[n][order] for n in ("pick_y", "pick_x")} | {"claimed_id": other["particle_id"][order]}
    file["natural_key"] = np.arange(len(order)) + 100
    out, told = with_ids(BIRTH, ROW, file, known_of([(own, False)]))
    places = {one: (y, x) for one, y, x in zip(*(own[n].tolist() for n in ("particle_id", "pick_y", "pick_x")))}
    for one, y, x in zip(*(out[n].tolist() for n in ("particle_id", "pick_y", "pick_x"))):
        assert birth_of(one) == BIRTH.number or places[one] == (y, x)
    assert told.get("unproven", 0) == int((birth_of(out["particle_id"]) == BIRTH.number).sum())
    # the particles of this project, in any order and at the places of their boxes, all come back
    own_file = {n: own[n][::-1] for n in ("pick_y", "pick_x")} | {"claimed_id": own["particle_id"][::-1]}
    own_file |= {"claimed_y": own_file["pick_y"], "claimed_x": own_file["pick_x"], "natural_key": np.arange(len(own["particle_id"]))}
    own_file |= {"pick_y": own_file["pick_y"] + 7, "half_set": 1 - own["particle_half"][::-1]}
    back, told = with_ids(BIRTH, ROW, own_file, known_of([(own, False)]))
    assert (back["particle_id"] == own["particle_id"][::-1]).all()
    assert (back["particle_half"] == own["particle_half"][::-1]).all(), "the half that was given at birth"
    assert told == {}


def test_columns_of_dropped_rows_go_with_them_and_the_others_stay_in_line() -> None:
    known = known_of([(born(Birth(1), ROW, of_places([(1, 1), (2, 2), (3, 3)]), None), False)])
    ids = make_ids(1, ROW, np.array([0, 2, 0, 0]))
    file = {
        "pick_y": np.float32([10, 50, 10, 90]),
        "pick_x": np.float32([10, 60, 10, 90]),
        "claimed_id": np.array([ids[0], 0, ids[0], 0]),
        "natural_key": np.array([7, 8, 9, 8]),
        "rot_deg": np.float32([1, 2, 3, 4]),
        "particle_image": np.arange(4.0)[:, None, None] * np.ones((1, 2, 2)),
        "particle_count": 4,
        "left_out_id": np.arange(4),
    }
    out, told = with_ids(BIRTH, ROW, file, known)
    assert out["particle_id"].tolist() == [int(ids[0]), int(make_ids(3, ROW, 0))]
    assert out["rot_deg"].tolist() == [1, 2]
    assert out["particle_image"][:, 0, 0].tolist() == [0, 1]
    assert (out["particle_count"], len(out["left_out_id"]), told) == (2, 4, {"twice": 2})


def test_a_pick_is_dealt_no_number_that_came_with_another_project() -> None:
    other = born(Birth(1), ROW, of_places([(1, 1), (2, 2), (3, 3)]), None)
    came, _ = with_ids(
        Birth(2), ROW, {**of_places([(1, 1), (2, 2), (3, 3)]), "claimed_id": other["particle_id"], "claims_by_name": True}, None
    )
    assert (came["particle_id"] == other["particle_id"]).all()
    mine = born(Birth(1), ROW, of_places([(2, 2), (9, 9)]), known_of([(came, False)]))
    assert number_of(mine["particle_id"]).tolist() == [1, 3]


def test_an_exposure_that_another_project_counts_differently_is_not_joined() -> None:
    own = born(Birth(1), ROW, of_places([(1, 1), (2, 2), (3, 3)]), None)
    for places, joined in (([(1, 1), (2, 2), (3, 3), (8, 8)], True), ([(1, 1), (7, 7), (3, 3), (8, 8)], False)):
        found = {**of_places(places), "claimed_id": make_ids(1, ROW, np.arange(4)), "claims_by_name": True}
        out, told = with_ids(Birth(2), ROW, found, known_of([(own, False)]))
        assert set(birth_of(out["particle_id"])) == {1 if joined else 2}
        assert told == ({} if joined else {"unproven": 4})


def test_copies_of_a_particle_that_is_not_known_stay_its_copies() -> None:
    claims = make_ids(1, ROW, np.repeat([0, 1], 3), np.tile([1, 2, 3], 2))
    found = {**of_places([(1, 1)] * 3 + [(2, 2)] * 3), "claimed_id": claims}
    out, told = with_ids(BIRTH, ROW, found, None)
    assert copy_of(out["particle_id"]).tolist() == [1, 2, 3] * 2
    assert len(np.unique(parent_of(out["particle_id"]))) == 2
    assert told == {"unproven": 6}
    again, _ = with_ids(BIRTH, ROW, found, known_of([(out, True)]))
    assert (again["particle_id"] == out["particle_id"]).all()


def test_particles_without_places_come_back_by_a_mark_of_their_name() -> None:
    own = born(Birth(1), ROW, of_names([5, 1 << 60, (1 << 60) + 1]), None)
    y, x = birth_marks(own["pick_y"], own["pick_x"], own["natural_key"])
    file = of_names([11, 12, 13]) | {"claimed_id": own["particle_id"], "claimed_y": y, "claimed_x": x}
    out, _ = with_ids(BIRTH, ROW, file, known_of([(own, False)]))
    assert (out["particle_id"] == own["particle_id"]).all()
    file["claimed_id"] = own["particle_id"][[1, 0, 2]]
    out, told = with_ids(BIRTH, ROW, file, known_of([(own, False)]))
    assert (birth_of(out["particle_id"]) == 1).tolist() == [False, False, True]
    assert told == {"unproven": 2}


@given(NAMES, PLACES)
@settings(max_examples=100, deadline=None)
def test_particles_of_another_birth_far_away_change_no_first_table(names: list[int], places: list[tuple[int, int]]) -> None:
    """A first table is made in a shorter way than one that is compared with others."""
    far = born(Birth(7), ROW, of_places([(500, 500)]), None)
    for found in (of_names(names), of_places(places)):
        found["claimed_id"] = np.zeros(len(found["pick_y"]), np.int64)
        (alone, told), (beside, told_beside) = (with_ids(BIRTH, ROW, found, known) for known in (None, known_of([(far, False)])))
        assert told == told_beside
        assert alone.keys() == beside.keys()
        for name in ("particle_id", "particle_half", "pick_y", "pick_x", "pick_score"):
            assert alone[name].dtype == beside[name].dtype
            assert alone[name].tolist() == beside[name].tolist()


@pytest.mark.parametrize("names", [[], [4]])
def test_small_tables(names: list[int]) -> None:
    assert len(born(BIRTH, ROW, of_names(names), born(BIRTH, ROW, of_names([4]), None))["particle_id"]) == 1


# --- the same through whole runs, with toy stages --------------------------------------------------------------------------------------
def who(project: Any, label: str) -> dict[tuple[str, float, float], tuple[int, int]]:
    """Id and half-set by exposure and place."""
    p = project.particles(label)
    columns = (p[n].values.tolist() for n in ("micrograph", "position_y_angstrom", "position_x_angstrom", "particle_id", "half_set"))
    return {(name, y, x): (one, half) for name, y, x, one, half in zip(*columns)}


def test_an_edited_table_of_edits_deals_no_id_again(tmp_path: Path, here) -> None:  # noqa: F811
    folder = session(tmp_path, 2)

    def edited(*rows: str) -> Any:
        (folder / "e.csv").write_text("\n".join(["micrograph,action,y,x,particle_id", *rows]) + "\n")
        return who(run(folder, here, ["toy_motion", "toy_pick", {"edit_picks": {"file": "e.csv"}}, "toy_extract"]), "edit_picks")

    known = edited("m000,add,6,6,")
    for rows in (["12,5", "6,6"], ["12,5"], ["7,3", "12,5", "12,5", "6,6"], ["6,6"]):
        now = edited(*(f"m000,add,{row}," for row in rows))
        assert len(now) == 6 + len(set(rows))
        for place, identity in now.items():
            assert known.setdefault(place, identity) == identity
    assert len({one for one, _ in known.values()}) == len(known)
    with pytest.raises(Exception, match=r"1 row of 1 micrograph left out.*other \(1\)"):
        edited("other,add,6,6,")


def test_changed_files_of_picks_deal_no_id_again(tmp_path: Path, here) -> None:  # noqa: F811
    folder = session(tmp_path, 2)
    (folder / "picks").mkdir()
    told = Told()

    def imported(*places: tuple[float, float]) -> Any:
        for name in ("m000", "m001", "elsewhere"):
            write_coordinates(folder / "picks" / f"{name}.star", *np.array(places, float).T)
        return who(run(folder, here, ["toy_motion", {"import_picks": {"folder": "picks"}}, "toy_extract"], listen=[told]), "import_picks")

    known = imported((3, 3), (9, 4), (5, 12))
    for places in ([(5, 12), (3, 3)], [(11, 11), (9, 4), (9, 4), (5, 12), (3, 3)], [(9, 4)]):
        for place, identity in imported(*places).items():
            assert known.setdefault(place, identity) == identity
    assert len({one for one, _ in known.values()}) == len(known) == 8
    assert "import_picks: 2 rows left out, because the particle is present already: m000 (1), m001 (1)" in told.said
    assert any(s.startswith("import_picks: 1 row of 1 micrograph left out") and s.endswith("elsewhere.star (1)") for s in told.said)
    # a result of before that counts again, by a parameter that was changed and changed back, forgets nobody
    for number in (2, 1):
        pipeline = [{"toy_motion": {"number": number}}, {"import_picks": {"folder": "picks"}}, "toy_extract"]
        run(folder, here, pipeline)
        for place, identity in imported((2, 2 + number), (9, 4)).items():
            assert known.setdefault(place, identity) == identity
    assert len({one for one, _ in known.values()}) == len(known) == 12


def _edited(*edits: dict[str, Any]) -> dict[str, Any]:
    given = {
        "particle_id": make_ids(1, 3, np.array([0, 1, 2])),
        "position_y_angstrom": np.array([20.0, 40.0, 60.0]),
        "position_x_angstrom": np.array([20.0, 40.0, 60.0]),
        "half_set": np.array([0, 1, 0], np.int8),
        "pixel_size_angstrom": 2.0,
    }
    return edit_picks.process(EditPicksParams(), **given, pick_edits=list(edits))


def test_edits_of_particles_that_are_not_there_are_counted_and_told() -> None:
    there, gone = int(make_ids(1, 3, np.array([1]))[0]), int(make_ids(7, 3, np.array([1]))[0])
    made = _edited(
        {"action": "remove", "id": there}, {"action": "move", "id": there, "place": (1.0, 1.0)}, {"action": "remove", "id": gone}
    )
    assert made["left_out_id"].tolist() == [there]
    assert made["unmatched"] == 2, "one was removed before it was moved, one was never there"
    table, told = with_ids(Birth(9), 3, made, None)
    assert told == {"unmatched": 2}
    assert row_messages("edit_picks", [{"name": "m1", **told}]) == [
        "edit_picks: 2 rows without effect, because the particle does not exist (another picking run, or not accepted): m1 (2)"
    ]
    assert set(table["particle_id"].tolist()) >= set(make_ids(1, 3, np.array([0, 2])).tolist())


def test_a_removal_with_its_place_holds_for_another_picking() -> None:
    """20 px = 40 A: the second particle, found 0.4 px away by the pick of then; 1.5 px away is another particle."""
    gone = int(make_ids(7, 3, np.array([1]))[0])
    assert (
        _edited({"action": "remove", "id": gone, "place": (20.4, 20.0)})["left_out_id"].tolist() == make_ids(1, 3, np.array([1])).tolist()
    )
    assert _edited({"action": "remove", "id": gone, "place": (21.5, 20.0)})["unmatched"] == 1
