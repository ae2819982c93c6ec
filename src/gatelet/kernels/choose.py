"""Which backend runs, and why. :func:`explain` reports what the ops themselves ask."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatelet._checks import check_choice
from gatelet.kernels.backends import BACKENDS, NAMES, Backend, Layer
from gatelet.kernels.backends._protocol import Kernel
from gatelet.kernels.pattern import flat

SAMPLE = 1 << 12
"""How many gates are read to measure the active fraction."""


@dataclass(frozen=True)
class Choice:
    """What runs, and why.

    Attributes:
        backend: ``"dense"``, ``"numba"`` or ``"triton"``.
        kernel: ``"dense"``, ``"unit"`` or ``"group"``.
        active_fraction: the share of open gates, measured on a sample of examples or declared; None if it did not
            look.
        limit: the active fraction below which the sparse kernel is expected to be faster.
        reason: in words.
    """

    backend: str
    kernel: Kernel
    active_fraction: float | None
    limit: float
    why: str = ""

    @property
    def reason(self) -> str:
        """Say why."""
        if self.why or self.active_fraction is None:
            return self.why
        # The words are made only when they are read, because that takes longer than deciding.
        side = "over" if self.backend == "dense" else "under"
        return f"{self.active_fraction:.1%} of the gates are open, {side} break-even at {self.limit:.0%}"


_known = functools.cache(Choice)
"""Choices that need no measurement; they are stored, because making one takes as long as a small layer."""


@functools.cache
def _announce(why: str) -> None:
    warnings.warn(
        f"gatelet.kernels: closed units are computed and discarded, because {why}",
        UserWarning,
        stacklevel=4,
    )


@functools.cache
def compiles() -> bool:
    """Return whether the CPU kernels for lists of rows can run (no backend is chosen for them); warn once if not."""
    why = BACKENDS["numba"].missing()
    if why:
        warnings.warn(f"gatelet: lists of rows use PyTorch's own operators, because {why}", UserWarning, stacklevel=3)
    return why is None


def share_open(gate: Tensor) -> float:
    """Return the share of open gates (B, G), from rows spread evenly over the batch."""
    sample = gate[:: step_of(gate.numel(), gate.shape[0])]
    return float(sample.count_nonzero()) / max(sample.numel(), 1)


def step_of(numbers: int, batch: int) -> int:
    """Return n such that a sample is every n-th of ``batch`` rows, of this many numbers in all."""
    return min(max(1, numbers // SAMPLE), max(batch, 1))


def check_backend(backend: str) -> str:
    """Return the backend's name; raise unless it is known and available."""
    if backend == "auto":
        return backend
    check_choice(backend, NAMES, "backend")
    if missing := BACKENDS[backend].missing():
        raise RuntimeError(f'backend="{backend}": {missing}')
    return backend


def choose(backend: str, layer: Layer, look: Callable[[], float], announce: bool = True) -> Choice:
    """Decide for a layer; ``look`` measures the share of open gates, and is called only where that is needed.

    Raises:
        ValueError: for a backend asked for by name that cannot run the layer.
    """
    if backend != "auto":
        _refuse_unable(backend, layer)
        return _known(backend, BACKENDS[backend].kernel(layer), None, 1.0 if backend != "dense" else 0.0, "asked for")
    found = None
    for candidate in BACKENDS.values():
        if candidate.device != layer.device.type:
            continue
        if why := candidate.cannot(layer):
            if announce:
                _announce(why)
            found = _known("dense", "dense", None, 0.0, why)
            continue
        found = _weigh(candidate, layer, look)
        if found.backend != "dense":
            return found
    return found or _known("dense", "dense", None, 0.0, f"no kernel for the device {layer.device}")


def choose_for_lists(backend: str, layer: Layer) -> str:
    """Return the backend for given lists of open units. Their products compute open pairs only, so no share has to be
    measured."""
    if backend != "auto":
        _refuse_unable(backend, layer)
        return backend
    for candidate in BACKENDS.values():
        if candidate.device == layer.device.type and not candidate.cannot(layer):
            return candidate.name
    return "dense"


def _weigh(candidate: Backend, layer: Layer, look: Callable[[], float]) -> Choice:
    """Return the candidate or dense, whichever is expected to be faster."""
    below, yes, no = candidate.worth(layer)
    if below <= 0:
        return _known("dense", "dense", layer.rate, 0.0, no)
    if below >= 1:
        return _known(candidate.name, candidate.kernel(layer), None, 1.0, yes)
    rate = look() if candidate.looks else layer.rate
    if rate is None:
        why = "no active_fraction was declared, and looking at the gates would make the GPU wait"
        return _known("dense", "dense", None, below, why)
    if rate <= below:
        return Choice(candidate.name, candidate.kernel(layer), rate, below, yes)
    return Choice("dense", "dense", rate, below, no)


def measure_costs(enabled: bool = True) -> None:
    """Make ``backend="auto"`` use costs timed on this machine, in this process and from now on.

    By default it uses costs stored for the kind of processor, so that a seed gives the same numbers in every process:
    another backend sums in another order, which changes the last digits. Where the stored costs do not fit, timing
    (some 30 ms for each dtype and kernel, at first use) may choose better.

    Args:
        enabled: False to use the stored costs again.

    >>> measure_costs()
    >>> measure_costs(False)
    """
    global _measured
    _measured = enabled
    for backend in BACKENDS.values():
        backend.measure(enabled)


_measured = False


@contextmanager
def by_kind() -> Iterator[None]:
    """Use the stored costs inside the block or function, whatever :func:`measure_costs` was called with."""
    before = _measured
    measure_costs(False)
    try:
        yield
    finally:
        measure_costs(before)


def settled(backend: str, layer: Layer) -> str:
    """Return the backend as far as it can be known without looking at values (inside tracing)."""
    if backend != "auto":
        _refuse_unable(backend, layer)
        return backend
    able = (each.looks and each.device == layer.device.type and not each.cannot(layer) for each in BACKENDS.values())
    return "auto" if any(able) else "dense"


def _refuse_unable(backend: str, layer: Layer) -> None:
    if why := BACKENDS[backend].cannot(layer):
        raise ValueError(f'backend="{backend}": {why}')


def running(backend: str, layer: Layer, look: Callable[[], float]) -> Backend:
    """Return the backend that runs now, where ``settled`` left it open."""
    return BACKENDS[choose(backend, layer, look).backend if backend == "auto" else backend]


def builder(backend: str, layer: Layer) -> Any:
    """Return the products that build a pattern under this backend; the kernels build it cheaply, whatever runs next."""
    for each in BACKENDS.values():
        wanted = each.name == backend or (backend == "auto" and each.device == layer.device.type)
        if wanted and not each.cannot(layer):
            return each.products
    return BACKENDS["dense"].products


def layer_of(weight: Tensor, gate: Tensor, batch: int, gradients: bool, rate: float | None = None) -> Layer:
    """Return the layer of W (N, D) and gates (B, G), of which ``gate`` may be a sample."""
    units, width = weight.shape
    group = units // max(gate.shape[1], 1)
    return Layer(batch, width, units, group, weight.dtype, weight.device, gradients, rate)


def explain(
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    *,
    backend: str = "auto",
    gradients: bool | None = None,
    active_fraction: float | None = None,
) -> Choice:
    """Return which kernel :func:`gatelet.kernels.gated_linear` runs for these arguments, and why.

    Args:
        x: (..., D).
        weight: (N, D).
        gate: (..., G).
        backend: as given to the op.
        gradients: whether a backward pass follows; by default, whether autograd records these tensors.
        active_fraction: as given to the op.

    >>> x, weight = torch.zeros(2, 8), torch.zeros(16, 8)
    >>> explain(x, weight, torch.ones(2, 16)).backend
    'dense'
    """
    check_backend(backend)
    if gradients is None:
        gradients = torch.is_grad_enabled() and any(each.requires_grad for each in (x, weight, gate))
    found = flat(gate.detach())
    layer = layer_of(weight, found, found.shape[0], gradients, active_fraction)
    return choose(backend, layer, functools.partial(share_open, found), announce=False)
