"""Adam's step on the rows of a matrix that have a gradient, compiled by Numba. Import this module only to run it."""

import inspect
import math
from typing import Any

import torch
from numba import njit
from torch import Tensor

from gatelet.kernels.backends.numba import gather as g
from gatelet.kernels.backends.numba import team
from gatelet.kernels.backends.numba import vector as v

VECTOR = v.VECTOR
arguments, gather_dots = g.arguments, g.gather_dots
take, read, write, read_word = v.take, v.read, v.write, v.read_word


def loosely(function: Any) -> Any:
    """Numba's decorator, with sums in any order, so that the compiler can use vectors."""
    return njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})(inspect.unwrap(function))


@loosely
def adam_row(
    w: Any,
    m: Any,
    s: Any,
    grad: Any,
    width: Any,
    along: Any,
    rate: Any,
    keep: Any,
    keep2: Any,
    eps: Any,
    size: Any,
    one: Any,
) -> Any:  # pragma: no cover (compiled)
    """Step a row, after subtracting ``along`` times the row from its gradient; return the row's new squared length."""
    length = one - one
    for j in range(width):
        at = j * size
        old = read(w + at, one)
        slope = read(grad + at, one) - along * old
        mean = read(m + at, one)
        mean += keep * (slope - mean)
        square = read(s + at, one)
        square += keep2 * (slope * slope - square)
        write(m + at, mean)
        write(s + at, square)
        new = old - rate * mean / (math.sqrt(square) + eps)
        write(w + at, new)
        length += new * new
    return length


@loosely
def scale_row(w: Any, width: Any, by: Any, size: Any, one: Any) -> None:  # pragma: no cover (compiled)
    """Multiply a row by a number."""
    for j in range(width):
        write(w + j * size, read(w + j * size, one) * by)


def _make(one: Any) -> dict[str, Any]:
    size = one.itemsize
    lanes = VECTOR // size

    def adam(p: Any) -> None:
        """Step the rows ``touched``; a task is ``span`` rows. ``numbers``: rate, 1 − β₁, 1 − β₂, ε."""
        counter, w, m, s, grad, touched, count, width, unit, numbers, scratch, span = arguments(p, 12)
        room = scratch + take(counter + 8) * 128
        pitch, length, rest = width * size, width // lanes * VECTOR, width % lanes
        rate, keep = read(numbers, one), read(numbers + size, one)
        keep2, eps = read(numbers + 2 * size, one), read(numbers + 3 * size, one)
        while True:
            first = take(counter) * span
            if first >= count:
                break
            for t in range(first, min(first + span, count)):
                row = read_word(touched + 8 * t)
                mine, slope = w + row * pitch, grad + t * pitch
                along = one - one
                if unit != 0:
                    here = touched + 8 * t
                    gather_dots(1, here, here, w, pitch, slope, length, rest, room, one)
                    gather_dots(1, here, here, w, pitch, mine, length, rest, room + size, one)
                    along = read(room, one) / read(room + size, one)
                squared = adam_row(
                    mine, m + row * pitch, s + row * pitch, slope, width, along, rate, keep, keep2, eps, size, one
                )
                if unit != 0:
                    scale_row(mine, width, one / math.sqrt(squared), size, one)

    return {"adam": adam}


kernels = g.Kernels(_make)


def adam_rows(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    touched: Tensor,
    grad: Tensor,
    *,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    unit: bool,
) -> None:
    """Step the rows ``touched`` (R,) of a weight (N, D), of Adam's mean and of its square by a gradient (R, D)."""
    count, width = grad.shape
    if not grad.numel():
        return
    threads = team.threads(4 * grad.numel())
    numbers = weight.new_tensor([rate, 1 - betas[0], 1 - betas[1], eps])
    scratch = weight.new_empty(threads * 128, dtype=torch.uint8)
    kernels.run(
        *("adam", 8 * weight.element_size(), threads),
        w=weight.data_ptr(),
        m=mean.data_ptr(),
        s=square.data_ptr(),
        grad=grad.data_ptr(),
        touched=touched.data_ptr(),
        count=count,
        width=width,
        unit=int(unit),
        numbers=numbers.data_ptr(),
        scratch=scratch.data_ptr(),
        span=32,
    )
