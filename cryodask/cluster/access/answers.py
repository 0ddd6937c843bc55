"""Answers of a guarded scheduler that depend on who asks: results, variables and queues, profiles, the task stream."""

from __future__ import annotations

import asyncio
import math
from contextlib import nullcontext
from time import monotonic, time
from typing import Any

from dask.utils import parse_timedelta
from distributed import profile

from cryodask.cluster.access import orders
from cryodask.cluster.access.peers import Peer, asking
from cryodask.cluster.access.whose import FORGETFUL, NAMED_CLIENTS, OwningScheduler
from cryodask.cluster.sharing.slices import LEAVING

_MOST_KINDS = 50
_AT_ONCE = 200
_OF_OTHERS = ("key", "worker", "thread", "startstops", "status", "nbytes", "typename")


class PrivateAnswers(OwningScheduler):
    """A scheduler that tells people only what is theirs."""

    _peers: dict[str, Peer]
    _orders: orders.Orders

    def answer_privately(self) -> None:
        """Put the handlers of this class before those of distributed's extensions."""
        self._of_extensions = {name: self.handlers[name] for name in ("variable_set", "variable_get", "queue_put")}
        self.handlers |= {"variable_set": self.variable_set, "variable_get": self.variable_get, "queue_put": self.queue_put}

    async def gather(self, keys: Any, serializers: Any = None) -> Any:
        """Like distributed's, but counts results in transit to a person."""
        user = asking()
        with nullcontext() if user is None else self._orders.fetching(user, keys):
            return await super().gather(keys, serializers)

    async def variable_set(self, name: str, key: Any = None, client: str | None = None, timeout: Any = None, **rest: Any) -> Any:
        """Like distributed's, but a person puts only their own results into a variable, or what they were given."""
        await self._until_here(key, timeout)
        return await self._of_extensions["variable_set"](name=name, key=key, client=client, timeout=timeout, **rest)

    async def queue_put(self, name: str, key: Any = None, client: str | None = None, timeout: Any = None, **rest: Any) -> Any:
        """Like distributed's, but a person puts only their own results into a queue, or what they were given."""
        await self._until_here(key, timeout)
        return await self._of_extensions["queue_put"](name=name, key=key, client=client, timeout=timeout, **rest)

    async def _until_here(self, key: Any, timeout: Any) -> None:
        user = asking()
        if user is None or key is None:
            return
        until = monotonic() + (parse_timedelta(timeout) if timeout is not None else math.inf)
        while key not in self.tasks:
            if monotonic() > until or not any(peer.name == user for peer in self._peers.values()):
                raise TimeoutError(f"Task {key} unknown to scheduler.")
            await asyncio.sleep(0.01)
        if not self.may_use(key, user):
            raise PermissionError(f"{key!r} is refused to {user}: it belongs to {self.whose(key)}.")

    async def variable_get(self, **arguments: Any) -> Any:
        """Like distributed's, but a reader who never confirms the answer does not keep the variable from changing."""
        record = await self._of_extensions["variable_get"](**arguments)
        orders.forget_unconfirmed(self, record, arguments.get("name"))
        return record

    async def get_profile(self, *args: Any, **options: Any) -> Any:
        """Like distributed's, but only of functions that nobody but the asking person has submitted."""
        user = asking()
        if user is None or options.get("key") is not None:
            return await super().get_profile(*args, **options)
        kinds = self.own_kinds(user)[-_MOST_KINDS:]
        found = [await super(PrivateAnswers, self).get_profile(*args, **{**options, "key": kind}) for kind in kinds]
        if options.get("merge_workers", True):
            return profile.merge(*found)
        return {address: profile.merge(*(one[address] for one in found if address in one)) for address in self.workers}

    def get_task_stream(self, *args: Any, **options: Any) -> Any:
        """Like distributed's; of other people's tasks only names, times and states."""
        user, records = asking(), super().get_task_stream(*args, **options)
        if user is None:
            return records
        return [r if self._is_own(r["key"], user) else {name: r[name] for name in _OF_OTHERS if name in r} for r in records]

    def _is_own(self, key: Any, user: str) -> bool:
        return key in self.tasks and self.whose(key) == user

    async def cancel_work(self, user: str) -> int:
        """Cancel what a person has sent, whether or not they are connected; returns how many tasks. What others wait for goes on."""
        keys = [key for key in self.tasks if self.whose(key) == user]
        unfinished = {key for key in keys if self.tasks[key].state not in ("memory", "erred")}
        mine = {FORGETFUL, *(name for name, peer in self._peers.items() if peer.name == user)}
        for first in range(0, len(keys), _AT_ONCE):
            for name in list(self.clients):
                cs, named = self.clients[name], name.startswith(NAMED_CLIENTS)
                if name in mine or name.startswith(LEAVING) or named:
                    some = [k for k in keys[first : first + _AT_ONCE] if k in self.tasks and self.tasks[k] in cs.wants_what]
                    its = [key for key in some if key in unfinished or not named]
                    if its:
                        self.client_releases_keys(keys=its, client=name, stimulus_id=f"cancel-work-{time()}")
                        self.report({"op": "cancelled-keys", "keys": its, "reason": "revoked", "msg": None}, client=name)
            await asyncio.sleep(0)
        return len(unfinished)
