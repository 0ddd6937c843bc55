"""What a scheduler says about its workers."""

from __future__ import annotations

from typing import Any

from distributed import Client


def workers_of(client: Client) -> dict[str, dict[str, Any]]:
    """The workers, keyed by address. ``Client.scheduler_info`` returns a field that the client's own beat may just have replaced with one
    that lacks them."""
    return client.sync(client.scheduler.identity, n_workers=-1)["workers"]
