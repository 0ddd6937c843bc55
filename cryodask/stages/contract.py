"""Stage ``contract``: turns symmetry copies back into particles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cryodask.errors import InputError
from cryodask.products import Product
from cryodask.stage import Output, Params, SetView, port, stage
from cryodask.store.identity import parent_of


class ContractParams(Params):
    """``contract`` has no parameters: values of copies are not kept, so it does not matter which copies remain."""


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
    """Take each particle with at least one remaining symmetry copy once.

    Poses are not kept, because that of a copy refers to one asymmetric unit. The particles get back their values from before the expansion,
    without those computed for their copies (classes, subtracted images).
    """
    view = inputs["particles"][0]
    if not len(view.ids):
        raise InputError("contract got no particles.", "", "check the step before it")
    return {
        "particle_id": np.unique(parent_of(view.ids)),
        "dropped_id": np.zeros(0, np.int64),
        "removal_reason": np.zeros(0, np.int8),
    }
