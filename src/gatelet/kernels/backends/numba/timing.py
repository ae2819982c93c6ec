"""Times the kernels' costs on this machine."""

import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gatelet.kernels.backends import dense
from gatelet.kernels.backends._protocol import Kernel
from gatelet.kernels.backends.numba import PAIR, PLACE, Costs, products


def costs(kernel: Kernel, dtype: torch.dtype) -> Costs:
    """Time a dense and two sparse products in turns (about 30 ms) and return the costs that follow."""
    batch, width, units = 128, 512, 512
    with torch.inference_mode():
        x = torch.ones(batch, width, dtype=dtype, device="cpu")
        weight = torch.ones(units, width, dtype=dtype, device="cpu")
        # Every k-th gate, shifted from row to row: as irregular for the kernels as random gates, without a generator.
        places = torch.arange(batch * units // (1 if kernel == "unit" else 64), device="cpu")
        ways: list[Callable[[], object]] = [functools.partial(dense.dots, x, weight, None, torch.ones_like(x), None)]
        rates = (0.125, 0.75)
        for rate in rates:
            gate: Tensor = ((places * 0.6180339887498949) % 1 < rate).to(dtype).view(batch, -1)
            ways.append(functools.partial(products.dots, x, weight, None, gate, None))
        best = [math.inf] * len(ways)
        for _ in range(15):
            for index, way in enumerate(ways):
                start = time.perf_counter()
                way()
                best[index] = min(best[index], time.perf_counter() - start)
    full, low, high = best
    slope = (high - low) / (rates[1] - rates[0]) / full
    fixed = low / full - slope * rates[0]
    # Limited to plausible values, since other processes may have disturbed these short measurements.
    return Costs(min(max(fixed - PLACE / width, 0.0), 0.4), min(max(slope / (1 + PAIR / width), 0.5), 3.0))
