"""Stage ``contract``: symmetry copies back to particles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cryodask.errors import InputError
from cryodask.products import Product
from cryodask.stage import Output, Params, SetView, port, stage
from cryodask.store.identity import parent_of


class ContractParams(Params):
    """``contract`` has no parameters: what was computed for copies is not kept, so it is all the same which copies are left."""


def _check(params: ContractParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    if inputs["particles"][0].copies == 1:
        yield f"{inputs['particles'][0].ref} has no symmetry copies, so there is nothing to contract. Leave the step out."


@stage(
    version=1,
    shape="set",
    needs=[],
    gives=[],
    ports=[port("particles[pose]", copies=True, subtracted=True)],
    outputs=[Output("particles", "particles", on="particles", subset=True, copies="contract", drops=("pose",))],
    check=_check,
)
def contract(params: ContractParams, inputs: dict[str, list[SetView]]) -> dict[str, Any]:
    """Take each particle once of which at least one symmetry copy is left.

    Poses are not kept: that of a copy refers to one asymmetric unit. What the particles had before the expansion is there again; what
    was computed for their copies (classes, subtracted images) is not.
    """
    view = inputs["particles"][0]
    if not len(view.ids):
        raise InputError("contract left no particles: it was given none.", "", "look at the step before it")
    return {
        "particle_id": np.unique(parent_of(view.ids)),
        "dropped_id": np.zeros(0, np.int64),
        "removal_reason": np.zeros(0, np.int8),
    }
