"""The minimum of a smooth function of a few variables."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SUFFICIENT = 1e-4
_FIRST, _CHANGE = 0.1, 0.01

Loss = Callable[[Tensor], tuple[float, Tensor]]


def descend(loss: Loss, start: Tensor, *, evaluations: int = 20) -> Tensor:
    """Local minimum near ``start`` by BFGS with a backtracking line search (Nocedal and Wright 2006, sections 3.1 and 6.1).

    ``torch.optim.LBFGS`` is not used because it imports torch's compiler, which takes 1.5 s of every new process.

    Parameters
    ----------
    loss : callable
        Maps `(variable,)` to a value and its gradient `(variable,)`. Variables are scaled such that 1 is a long step: the first has a
        length of 0.1, and the search ends after one of less than 0.01 in each.
    start : Tensor
        `(variable,)` float64.
    evaluations : int
        Largest number of calls of ``loss``.

    Returns
    -------
    Tensor
        `(variable,)` float64.
    """
    x = start
    value, slope = loss(x)
    inverse: Tensor | None = None
    direction, length = -_FIRST / (slope.norm() + 1e-300) * slope, 1.0
    for _ in range(evaluations - 1):
        step = length * direction
        descent = float(slope @ step)
        if not descent < 0.0:
            break
        new_value, new_slope = loss(x + step)
        small = inverse is not None and float(direction.abs().max()) < _CHANGE
        if new_value <= value + _SUFFICIENT * descent:
            inverse = _updated(inverse, step, new_slope - slope)
            x, value, slope = x + step, new_value, new_slope
            direction, length = 2.0 * direction if inverse is None else -(inverse @ slope), 1.0
        else:
            # the minimum of the parabola through both values and the slope, within reason
            length *= max(0.1, -0.5 * descent / (new_value - value - descent))
        if small:
            break
    return x


def with_gradient(loss: Callable[[Tensor], Tensor]) -> Loss:
    """A function of differentiable operations, as :func:`descend` takes it."""

    def both(x: Tensor) -> tuple[float, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = loss(x)
            (slope,) = torch.autograd.grad(value, x)
        return float(value.detach()), slope

    return both


def _updated(inverse: Tensor | None, step: Tensor, change: Tensor) -> Tensor | None:
    """Inverse Hessian after a step that changed the gradient by ``change``; where the function is not convex, the earlier one."""
    curvature = float(step @ change)
    if not curvature > 0.0:
        return inverse
    unity = torch.eye(len(step), dtype=step.dtype)
    if inverse is None:
        inverse = unity * (curvature / float(change @ change))
    left = unity - torch.outer(step, change) / curvature
    return left @ inverse @ left.T + torch.outer(step, step) / curvature
