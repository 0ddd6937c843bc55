"""Dask's dashboard, loaded when one of its pages is first requested: bokeh takes half a CPU second, and few runs are looked at."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from distributed import Scheduler
from tornado import web


class DashboardOnDemand(web.Application):
    """Stands for the dashboard among the applications of a scheduler's web server, which ask each in turn for a request's handler.

    Attributes
    ----------
    then : list of callables
        Called once the dashboard is there, to add pages to it.
    """

    def __init__(self, scheduler: Scheduler, prefix: str) -> None:
        super().__init__()
        self._scheduler, self._prefix = scheduler, prefix
        self.then: list[Callable[[], None]] = []

    def find_handler(self, request: Any, **options: Any) -> Any:
        """Load the dashboard in place of this object; returns its handler of the request."""
        from distributed.dashboard.scheduler import connect

        application = self._scheduler.http_application
        application.applications.remove(self)
        connect(application, self._scheduler.http_server, self._scheduler, prefix=self._prefix)
        for add in self.then:
            add()
        return application.find_handler(request, **options)


def without_dashboard(options: dict[str, Any]) -> bool:
    """Change the options of a scheduler so that it starts without a dashboard; whether it would have had one."""
    wanted = options.get("dashboard")
    if wanted is None:
        wanted = options.get("dashboard_address")
    try:
        found = bool(wanted) and find_spec("bokeh") is not None
    except ImportError:
        found = False
    if found:  # without bokeh Dask's own page says what to install
        options["dashboard"] = False
    return found
