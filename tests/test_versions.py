"""What pyproject.toml declares of other packages is what the tests ran with (`make test-oldest`)."""

from __future__ import annotations

import os
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
DECLARED = [Requirement(text) for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()) for text in texts]
OTHERS = [r for r in DECLARED if r.name != "cryodask"]


def lower_bound(requirement: Requirement) -> Version | None:
    return next((Version(s.version) for s in requirement.specifier if s.operator == ">="), None)


def test_every_package_has_a_lower_bound_in_one_place_at_least():
    bounded = {r.name for r in OTHERS if lower_bound(r)}
    assert {r.name for r in OTHERS} == bounded


@pytest.mark.skipif("CRYODASK_TESTS_OLDEST" not in os.environ, reason="set by make test-oldest")
def test_every_lower_bound_is_what_is_installed_here():
    bounds = {r.name: lower_bound(r) for r in OTHERS if lower_bound(r)}
    installed = {name: Version(version(name)) for name in bounds}
    apart = {n: (str(installed[n]), str(b)) for n, b in bounds.items() if _three(installed[n]) != _three(b)}
    assert not apart


def _three(release: Version) -> tuple[int, ...]:
    """The first three numbers: 2.13.0+cpu is 2.13, and 6.0.12.20240621 the first release of 6.0.12."""
    return (*release.release, 0, 0)[:3]
