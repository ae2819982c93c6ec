"""The CPU backend: kernels compiled by Numba, on the threads of torch's own pool."""

import functools
import importlib
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gatelet.kernels.backends._protocol import Backend, Kernel, Layer, Worth

DTYPES = (torch.float32, torch.float64)
SMALLEST_GROUP = 4
"""Groups of at least this many units go through the group kernel, which multiplies four units at a time."""
SMALL = 1 << 16
"""Layers of fewer multiply-adds than this run dense: they take almost no time anyway, and nothing needs compiling."""
PAIR, PLACE = 90, 50
"""Further costs, in multiply-adds of the dense product. PAIR: of an open pair, beside its D multiply-adds (sum, bias,
gate). PLACE: of any pair (its bit in the pattern, and the zero that is written if it is closed)."""
FEW = 8
"""Up to this many examples the kernels win at any active fraction, as the dense product is bound by memory too."""
NEAR = 1 << 22
"""Weights of fewer bytes than this stay in the caches. A dense product with them does not wait for memory, so
:data:`FEW` does not apply."""


class Costs(NamedTuple):
    """A kernel's time as a multiple of the dense product's: ``fixed`` + ``slope`` · active fraction.

    This holds for many features. With few, :data:`PLACE` per pair and :data:`PAIR` per open pair are added.
    """

    fixed: float
    slope: float


@functools.cache
def missing() -> str | None:
    """Return why the backend cannot run in this process, or None if it can. It imports nothing."""
    if not importlib.util.find_spec("numba"):
        return "numba is not installed"
    config = sys.modules.get("numba.core.config")
    off = os.environ.get("NUMBA_DISABLE_JIT", "0") if config is None else config.DISABLE_JIT
    return "Numba compiles nothing where NUMBA_DISABLE_JIT is set" if off not in ("", "0", 0) else None


class Numba(Backend):
    """The backend."""

    name = "numba"
    device = "cpu"
    by_gate = False
    looks = True
    spares = 1 << 23

    def missing(self) -> str | None:
        """Return why the backend runs nowhere, None if it does."""
        return missing()

    def cannot(self, layer: Layer) -> str | None:
        """Return why the kernels cannot run this layer, None if they can."""
        if layer.device.type != "cpu":
            return f"the kernels run on the CPU, but the tensors are on {layer.device}"
        if layer.dtype not in DTYPES:
            return f"the CPU kernels are for float32 and float64, not {layer.dtype}"
        return missing()

    def kernel(self, layer: Layer) -> Kernel:
        """Return which kernel runs."""
        return "group" if layer.group >= SMALLEST_GROUP else "unit"

    def worth(self, layer: Layer) -> Worth:
        """Return below which share of open gates the kernels are expected to be faster than dense."""
        if layer.batch * layer.units * layer.width < SMALL:
            return Worth(0.0, no="so small that starting a kernel costs more than it saves")
        below = limit(layer)
        return Worth(below, "the kernel is faster at any active fraction" if below == 1.0 else "")

    def measure(self, enabled: bool) -> None:
        """Use costs timed on this machine, or those stored for its kind of processor."""
        global _timed
        _timed = enabled

    @functools.cached_property
    def products(self) -> Any:
        """The products; importing them imports Numba."""
        return importlib.import_module("gatelet.kernels.backends.numba.products")


def limit(layer: Layer) -> float:
    """Return the active fraction at which kernel and dense product are expected to take the same time."""
    work = layer.batch * layer.units * layer.width
    if layer.batch <= FEW:
        # A call costs about as much as SMALL multiply-adds. Counting the open gates would add a tenth or more.
        return 1.0 if work >= 4 * SMALL else 1.0 - SMALL / max(work, SMALL)
    gradients, width = layer.gradients, layer.width
    # Only the forward pass has a kernel for groups. The two other products of a training step run by unit.
    cost = costs("group" if layer.group >= SMALLEST_GROUP and not gradients else "unit", layer.dtype)
    # The backward products build no pattern and apply no gates, but they write more: the gradient of a weight is as
    # large as the weight, even for a few examples.
    each = 2 * width if gradients else width
    few = FEW if not gradients and layer.units * width * layer.dtype.itemsize >= NEAR else 0
    left = max(1 - cost.fixed - PLACE / each, 0.0)
    return min(1.0, left / (cost.slope * (1 + PAIR / each)) + few / layer.batch)


# Costs relative to dense products, by maker and vector width, which decide how fast dense products run.
# AMD: timed by ``timing.costs`` on Zen 5 (512 bits) and Zen 3 (256 bits). All others: from one Intel Xeon with
# 512 bits, on which products at 10 % open took 0.4 to 0.5 of the dense time.
_COSTS: dict[tuple[str, str], dict[str, Costs]] = {
    ("AMD", "AVX512"): {"unit": Costs(0.05, 0.85), "group": Costs(0.0, 0.5)},
    ("AMD", "AVX2"): {"unit": Costs(0.1, 1.1), "group": Costs(0.0, 0.85)},
    ("", ""): {"unit": Costs(0.15, 2.2), "group": Costs(0.1, 1.6)},
}
_timed = False


def costs(kernel: Kernel, dtype: torch.dtype) -> Costs:
    """Return the kernel's costs: from the table, or timed here if :meth:`Numba.measure` was called."""
    if _timed:
        return measured(kernel, dtype)
    return _COSTS.get(processor(), _COSTS["", ""])[kernel]


@functools.cache
def processor() -> tuple[str, str]:
    """Return the processor's kind: its maker and the vectors that torch uses."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        told = platform.processor()
    return "AMD" if "AuthenticAMD" in told else "", torch.backends.cpu.get_cpu_capability()


@functools.cache
def measured(kernel: Kernel, dtype: torch.dtype) -> Costs:
    """Time what the kernel costs, once per process (some 30 ms)."""
    from gatelet.kernels.backends.numba import timing

    return timing.costs(kernel, dtype)
