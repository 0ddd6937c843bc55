"""What the lanes need of distributed beyond its documented interface: a version that changes one of these must be looked at first.

Run these tests, and those of lanes, guard, certificates and pools, on the oldest and the newest version that pyproject.toml admits.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import textwrap

import distributed.core
import distributed.scheduler
import pytest
from _lanes import client, cluster, run, sleep
from distributed import Client, Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import TaskPrefix, TaskState, WorkerState

from cryodask.cluster.access.gate import OWNER_OPS, USER_OPS, WORKER_OPS
from cryodask.cluster.fairshare import FairShareScheduler
from cryodask.cluster.sharing.lanes import LaneQueue

PARAMETERS = {
    "_transition_waiting_processing": ["self", "key", "stimulus_id"],
    "_transition_queued_processing": ["self", "key", "stimulus_id"],
    "_transition_no_worker_processing": ["self", "key", "stimulus_id"],
    "stimulus_queue_slots_maybe_opened": ["self", "stimulus_id"],
    "transitions": ["self", "recommendations", "stimulus_id"],
    "_add_to_processing": ["self", "ts", "ws", "stimulus_id"],
    "_exit_processing_common": ["self", "ts"],
    "handle_task_finished": ["self", "key", "worker", "stimulus_id", "msg"],
    "decide_worker_non_rootish": ["self", "ts"],
    "decide_worker_rootish_queuing_enabled": ["self"],
    "is_rootish": ["self", "ts"],
    "valid_workers": ["self", "ts"],
    "get_comm_cost": ["self", "ts", "ws"],
    "is_unoccupied": ["self", "ws", "occupancy", "nprocessing"],
    "handle_worker_status_change": ["self", "status", "worker", "stimulus_id"],
    "_remove_key": ["self", "key"],
    "validate_queued": ["self", "key"],
    "add_client": ["self", "comm", "client", "versions"],
    "update_data": ["self", "who_has", "nbytes", "client"],
    "report": ["self", "msg", "ts", "client"],
    "_task_to_msg": ["self", "ts"],
    "handle_stream": ["self", "comm", "extra"],
    "bulk_schedule_unrunnable_after_adding_worker": ["self", "ws"],
    "coerce_address": ["self", "addr", "resolve"],
    "remove_worker": ["self", "address", "stimulus_id", "expected", "close"],
    "_transition_memory_released": ["self", "key", "stimulus_id"],
    "_transition_memory_forgotten": ["self", "key", "stimulus_id"],
    "handle_worker": ["self", "comm", "worker"],
    "gather_on_worker": ["self", "worker_address", "who_has"],
    "scatter": ["self", "data", "workers", "client", "broadcast", "timeout"],
    "get_ncores_running": ["self", "workers"],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_methods_that_are_overridden_or_called_take_these_parameters(name):
    assert list(inspect.signature(getattr(Scheduler, name)).parameters) == PARAMETERS[name]


def test_a_client_keeps_the_task_that_hears_its_scheduler_and_comes_back_to_it():
    assert "_handle_report_task" in inspect.getsource(Client.__init__)
    assert "self._handle_report()" in inspect.getsource(Client._start)
    assert "_reconnect()" in inspect.getsource(Client._handle_report)


def test_parameters_that_are_passed_on_whole_have_these_names_among_them():
    assert {"key", "worker", "compute_duration", "stimulus_id"} <= set(inspect.signature(Scheduler.handle_long_running).parameters)
    assert "submitting_task" in inspect.signature(Scheduler._create_taskstate_from_graph).parameters
    assert not inspect.iscoroutinefunction(Scheduler._create_taskstate_from_graph)
    assert "versions" in inspect.signature(Scheduler.add_worker).parameters
    assert {"client", "tasks", "annotations"} <= set(_keywords_of_call(Scheduler, "update_graph"))
    assert inspect.signature(SchedulerPlugin.update_graph).return_annotation in ("None", None)


def _keywords_of_call(cls: type, method: str) -> list[str]:
    """Keywords with which any code of a class calls a method of that name on a plugin."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [k.arg for call in calls if call.func.attr == method for k in call.keywords if k.arg]


def test_the_table_of_transitions_holds_functions_under_these_keys():
    ours = set(FairShareScheduler._TRANSITIONS_TABLE.items()) - set(Scheduler._TRANSITIONS_TABLE.items())
    waiting = {("waiting", "processing"), ("queued", "processing"), ("no-worker", "processing")}
    assert {key for key, _ in ours} == waiting | {("memory", "released"), ("memory", "forgotten")}
    assert {key for key, _ in ours} <= set(Scheduler._TRANSITIONS_TABLE)
    assert all(inspect.isfunction(function) for function in Scheduler._TRANSITIONS_TABLE.values())


def test_the_scheduler_uses_nothing_of_its_queue_that_ours_lacks():
    tree = ast.parse(inspect.getsource(inspect.getmodule(Scheduler)))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "queued"
        and isinstance(node.value.value, ast.Name)
    }
    # peekn and topk serve distributed's own way of filling slots, which ours replaces
    assert used <= {"add", "remove", "discard", "clear", "peek", "peekn", "topk", "sorted"}, used
    replaced = inspect.getsource(Scheduler.stimulus_queue_slots_maybe_opened)
    for name in used - set(dir(LaneQueue)):
        assert f"queued.{name}" in replaced, name
    assert {"__len__", "__iter__", "__contains__", "add", "discard", "remove"} <= set(dir(LaneQueue))


def test_tasks_workers_and_prefixes_have_what_is_read():
    assert {
        "actor",
        "resource_restrictions",
        "worker_restrictions",
        "host_restrictions",
        "processing_on",
        "priority",
        "suspicious",
    } <= _fields(TaskState)
    assert hasattr(TaskState, "_queueable") or "_queueable" in _fields(TaskState)
    assert {"resources", "used_resources", "processing", "long_running", "nthreads"} <= _fields(WorkerState)
    assert {"duration_average", "max_exec_time"} <= _fields(TaskPrefix)
    assert {"idle_task_count", "unrunnable", "running", "WORKER_SATURATION", "UNKNOWN_TASK_DURATION"} <= _named_in(Scheduler)


def _fields(cls: type) -> set[str]:
    return set(getattr(cls, "__slots__", ())) | set(getattr(cls, "__annotations__", {})) | set(dir(cls))


def _named_in(cls: type) -> set[str]:
    source = inspect.getsource(inspect.getmodule(cls))
    return {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}


def test_a_finished_task_is_reported_with_the_times_of_its_worker(monkeypatch):
    reports = []
    handle = FairShareScheduler.handle_task_finished
    monkeypatch.setattr(
        FairShareScheduler, "handle_task_finished", lambda self, **message: (reports.append(message), handle(self, **message))
    )

    async def scenario():
        async with cluster(1, 1, lanes={"A": 1}) as scheduler, client(scheduler, "A") as a:
            assert await a.submit(sleep, 3, 0.1, pure=False) == 3

    run(scenario)
    (phase,) = [phase for report in reports for phase in report["startstops"] if phase["action"] == "compute"]
    assert 0.1 <= phase["stop"] - phase["start"] < 5


def test_every_request_of_this_version_is_in_the_lists_of_the_guard():
    source = inspect.getsource(Scheduler.__init__)
    tree = ast.parse(textwrap.dedent(source))
    requests: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Attribute) and target.attr == "handlers":
                requests = {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    assert len(requests) > 40
    unknown = requests - USER_OPS - WORKER_OPS - OWNER_OPS
    assert not unknown, f"closed to all but the owner until somebody has looked at them: {unknown}"


def test_a_connection_tells_the_certificate_of_the_other_side():
    source = inspect.getsource(__import__("distributed.comm.tcp", fromlist=["tcp"]))
    assert "peercert" in source
    assert hasattr(distributed.core.Server, "handle_comm")


def test_the_stream_to_a_client_has_an_interval_that_can_be_set():
    async def scenario():
        async with cluster(1, 1) as scheduler, client(scheduler, "A/x") as a:
            assert await a.submit(sleep, 1, 0.0) == 1
            assert scheduler.client_comms[a.id].interval == 0.01, "it is 2 ms in distributed, and 10 ms from a client to the scheduler"

    run(scenario)


def test_a_client_that_scatters_asks_the_scheduler_before():
    """Who sends data to workers without that would meet what they are yet to forget."""
    source = inspect.getsource(Client._scatter)
    assert 0 < source.index("self.scheduler.ncores_running(") < source.index("await scatter_to_workers(")
    assert "self.scheduler.scatter(" in source
    assert inspect.getsource(distributed.scheduler).count("scatter_to_workers(") == 1


def test_what_a_worker_may_forget_is_told_in_these_words():
    async def scenario():
        async with cluster(1, 1) as scheduler, client(scheduler, "A/x") as a:
            first = a.submit(sleep, 1, 0.0, key="first")
            await first
            (stream,) = scheduler.stream_comms.values()
            sent = []
            stream.send = lambda *messages: sent.extend(messages)
            second = a.submit(sleep, 2, 0.0, first, key="second")
            while not sent:
                await asyncio.sleep(0.01)
            (message,) = sent
            assert (message["op"], message["key"], set(message["who_has"])) == ("compute-task", "second", {"first"})
            _, _, to_workers = Scheduler._transition_memory_released(scheduler, "first", "stimulus")
            assert to_workers == {next(iter(scheduler.workers)): [{"op": "free-keys", "keys": ["first"], "stimulus_id": "stimulus"}]}
            del second

    run(scenario)
