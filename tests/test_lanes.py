"""The tree of shares by itself: who is served next, and that nobody gains or loses by having been away."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.cluster.sharing.lanes import LaneOptions, LaneQueue, Share


@dataclass(frozen=True)
class Task:
    name: str
    priority: tuple = (0,)


def _tree(weights: dict[str, float]) -> tuple[Share, dict[str, Share], LaneQueue]:
    root = Share("threads")
    leaves = {}
    for name, weight in weights.items():
        lane = root.children[name] = Share(name, weight, root)
        user = lane.children["u"] = Share("u", 1.0, lane)
        leaves[name] = user.children[""] = Share("", 1.0, user)
    return root, leaves, LaneQueue(lambda task: leaves[task.name[0]])


def _serve(root: Share, queue: LaneQueue, cost: float) -> str:
    leaf = root.next_leaf()
    assert leaf is not None
    task = queue.best_at(leaf, "here")
    queue.discard(task)
    leaf.launch(cost)
    leaf.land(0.0, cost)
    return leaf.lane.name


@settings(deadline=None, max_examples=15)
@given(
    weights=st.lists(st.integers(1, 8), min_size=2, max_size=5),
    costs=st.lists(st.floats(0.01, 2.0), min_size=5, max_size=5),
)
def test_time_is_shared_by_weight_whatever_the_tasks_take(weights, costs):
    names = "ABCDE"[: len(weights)]
    root, leaves, queue = _tree({n: float(w) for n, w in zip(names, weights)})
    used = dict.fromkeys(names, 0.0)
    for name in names:
        for number in range(2000):
            queue.put(Task(name + str(number)), leaves[name], None)
    while sum(used.values()) < 100 * sum(costs) and all(leaves[n].held for n in names):
        name = root.next_leaf().lane.name
        assert _serve(root, queue, costs[names.index(name)]) == name
        used[name] += costs[names.index(name)]
    # start-time fair queueing: normalised times differ by at most one longest task of each (Goyal et al. 1996, theorem 1)
    normalised = [used[n] / w for n, w in zip(names, weights)]
    bound = max(c / w for c, w in zip(costs, weights)) * 2
    assert max(normalised) - min(normalised) <= bound + 1e-9


def test_a_lane_that_was_away_gets_no_credit_and_no_debt():
    root, leaves, queue = _tree({"A": 1, "B": 1})
    for number in range(100):
        queue.put(Task(f"A{number}"), leaves["A"], None)
    for _ in range(50):
        _serve(root, queue, 1.0)
    for number in range(100):
        queue.put(Task(f"B{number}"), leaves["B"], None)
    served = "".join(_serve(root, queue, 1.0) for _ in range(20))
    assert served.count("B") == 10
    assert "BBB" not in served


def test_a_lane_that_comes_anew_starts_ahead_of_what_others_have_sent_ahead():
    _, leaves, queue = _tree({"A": 1, "B": 1})
    queue.put(Task("A"), leaves["A"], None)
    tags = []
    for _ in range(40):
        tags.append(leaves["A"].lane.start_tag())
        leaves["A"].launch(1.0)
        if len(tags) > 16:  # sixteen are in flight
            leaves["A"].land(0.0, 1.0)
    queue.put(Task("B"), leaves["B"], None)
    assert leaves["B"].lane.start_tag() < tags[-8], "on workers of one thread half of what A sent has not begun"
    assert tags == sorted(tags)
    assert len(set(tags)) < len(tags) / 2, "most consecutive tasks share a tag, so that Dask's own order holds among them"


@settings(deadline=None, max_examples=25)
@given(far_more=st.floats(0.0, 1000.0), thought=st.floats(0.0, 1000.0), sent_before=st.integers(0, 20))
def test_a_lane_that_comes_anew_shares_at_once_whatever_the_tasks_of_another_took(far_more, thought, sent_before):
    # start-time fair queueing: a flow that comes starts at the start tag in service (Goyal et al. 1996), not behind another's debt
    root, leaves, queue = _tree({"A": 1, "B": 1, "C": 1})
    for number in range(200):
        for name in "AB":
            queue.put(Task(f"{name}{number}"), leaves[name], None)
    for _ in range(sent_before):
        _serve(root, queue, 1.0)
    for _ in range(2):  # both have sent one, and either may be wrong about it: by far too little, by far too much
        leaf = root.next_leaf()
        queue.discard(queue.best_at(leaf, "here"))
        cost = thought if leaf is leaves["A"] else 1.0
        leaf.launch(cost)
        leaf.land((far_more if leaf is leaves["A"] else 1.0) - cost, far_more if leaf is leaves["A"] else 1.0)
    for _ in range(3):
        _serve(root, queue, 1.0)
    for number in range(100):
        queue.put(Task(f"C{number}"), leaves["C"], None)
    served = "".join(_serve(root, queue, 1.0) for _ in range(24))
    assert "C" in served[:2], served
    assert served.count("C") <= 13, f"nor is it ahead of everybody: {served}"


def test_strict_lanes_go_first_and_inside_a_lane_users_share():
    root = Share("threads")
    live = root.children["live"] = Share("live", 1.0, root, strict=True)
    users = {}
    for lane, user in ((live, "x"), (root.children.setdefault("hpda", Share("hpda", 9.0, root)), "y")):
        mid = lane.children[user] = Share(user, 1.0, lane)
        users[user] = mid.children[""] = Share("", 1.0, mid)
    queue = LaneQueue(lambda task: users["x"])
    for number in range(3):
        queue.put(Task(f"x{number}"), users["x"], None)
        queue.put(Task(f"y{number}"), users["y"], None)
    assert [_serve(root, queue, 5.0) for _ in range(6)] == ["live"] * 3 + ["hpda"] * 3


def test_the_queue_knows_places_and_keeps_no_dead_tasks():
    _, leaves, queue = _tree({"A": 1})
    leaf = leaves["A"]
    here, there, both, anywhere = (Task(f"A{n}", (n,)) for n in range(4))
    for task, place in ((here, "here"), (there, "there"), (both, frozenset({"here", "there"})), (anywhere, None)):
        queue.put(task, leaf, place)
    assert queue.best_at(leaf, "here") is here
    assert queue.best_at(leaf, "there") is there
    assert queue.best_at(leaf, "elsewhere") is anywhere
    assert queue.tasks_at("there") == [there]
    assert queue.restricted() == [both]
    assert queue.near == 2
    queue.discard(here)
    assert queue.near == 1
    assert queue.best_at(leaf, "here") is both
    with pytest.raises(KeyError):
        queue.remove(here)
    for task in queue:
        queue.discard(task)
    assert len(queue) == queue.near == 0
    assert leaf.heaps == {}
    assert leaf.clock.held == leaf.clock.flying == 0
    assert leaf.clock.next_leaf() is None


@pytest.mark.parametrize("bad", [0, -1, {"weight": 0}, {"users": {"anna": -2}}])
def test_weights_that_are_not_positive_are_refused(bad):
    with pytest.raises(ValueError, match="positive"):
        LaneOptions.parse("live", bad)


def test_weights_of_users_and_projects_are_read():
    options = LaneOptions.parse("live", {"weight": 3, "users": {"anna": 2}, "projects": {"p": 4}})
    assert (options.weight, options.users["anna"], options.projects["p"]) == (3, 2, 4)
