"""The minimum of a smooth function of a few variables.

``torch.optim.LBFGS`` would do the same, but it imports torch's compiler, which takes 1.5 s of every new process.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

Loss = Callable[[Tensor], tuple[float, Tensor]]


def descend(loss: Loss, start: Tensor, *, evaluations: int = 30) -> Tensor:
    """Local minimum near ``start`` `(variable,)` float64, by L-BFGS-B.

    Parameters
    ----------
    loss : callable
        Maps `(variable,)` to a value and its gradient `(variable,)`. Variables should be scaled such that 1 is a long step: the search ends
        where no derivative exceeds 1e-4, or the value changes by less than 1e-8 of itself.
    evaluations : int
        Number of calls of ``loss`` after which the search ends.
    """

    def both(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = loss(torch.from_numpy(np.array(x)))
        return value, slope.numpy()

    limits = {"maxfun": evaluations, "ftol": 1e-8, "gtol": 1e-4}
    found = minimize(both, start.numpy(), jac=True, method="L-BFGS-B", options=limits)
    return torch.from_numpy(np.array(found.x))


def with_gradient(loss: Callable[[Tensor], Tensor]) -> Loss:
    """A function of differentiable operations, as :func:`descend` takes it."""

    def both(x: Tensor) -> tuple[float, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = loss(x)
            (slope,) = torch.autograd.grad(value, x)
        return float(value.detach()), slope

    return both
