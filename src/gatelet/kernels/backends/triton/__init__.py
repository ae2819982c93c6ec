"""The backend for CUDA devices: kernels in Triton."""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

from gatelet.kernels.backends._protocol import Backend, Kernel, Layer, Worth

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALLEST_GROUP = 4
FEW = 16
"""For at most this many examples, programs read only the rows of open units, and the time is that of reading them."""
SMALLEST_LIST = 16
"""Groups of at least this many units are multiplied by lists of their examples; tensor cores have no smaller tiles."""
# The rule of ``worth``, from measurements on an H100 (docs/gpu.md).
BYTES = {False: 1 << 23, True: 1 << 25}
"""Few examples read smaller weights in about the time of starting a kernel; without and with a backward pass."""
READ = 0.6
"""The most of the weights that several examples may read: what is open for any of them."""
ONE = {False: 0.4, True: 0.15}
"""The largest active fraction at which one example runs sparse, without and with a backward pass."""
GROUP, BATCH = 64, 512
"""The least group, and number of examples, that fill tiles: at 10 % open, 51 examples per group."""
WORK = 1 << 33
"""Multiply-adds of the dense product, below which groups do not pay for their lists and the zeros at closed pairs."""
RATE = {False: 0.4, True: 0.25}
"""The largest active fraction at which groups run sparse, without and with a backward pass."""


@functools.cache
def missing() -> str | None:
    """Return why the backend cannot run in this process, or None if it can. It imports nothing."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed (pip install 'gatelet[triton]')"
    if not torch.cuda.is_available() and not _interpreted():
        return "there is no CUDA device"
    return None


def _interpreted() -> bool:
    # Triton's own switch; it must be set before triton is imported.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "on", "true")


class Triton(Backend):
    """The backend."""

    name = "triton"
    device = "cuda"
    by_gate = False
    looks = False
    spares = None

    def missing(self) -> str | None:
        """Return why the backend runs nowhere, None if it does."""
        return missing()

    def cannot(self, layer: Layer) -> str | None:
        """Return why the kernels cannot run this layer, None if they can."""
        if why := missing():
            return why
        if layer.device.type != "cuda" and not (layer.device.type == "cpu" and _interpreted()):
            return (
                f"the tensors are on {layer.device}, but the kernels run on CUDA devices (and, for tests, on the CPU "
                "with TRITON_INTERPRET=1 set before triton is imported)"
            )
        return None if layer.dtype in DTYPES else f"there is no kernel for {layer.dtype}"

    def kernel(self, layer: Layer) -> Kernel:
        """Return which kernel runs."""
        return "group" if layer.group >= SMALLEST_GROUP else "unit"

    def worth(self, layer: Layer) -> Worth:
        """Return below which declared share of open gates the kernels are expected to be faster than dense."""
        if layer.dtype == torch.float64:
            return Worth(0.0, no=f"dense is faster in {layer.dtype}")
        multiplied = layer.batch * layer.units * layer.width
        if layer.batch <= 1 or (layer.batch <= FEW and not layer.gradients):
            if layer.units * layer.width * layer.dtype.itemsize < BYTES[layer.gradients]:
                return Worth(0.0, no="so small that starting the kernels costs more than they save")
            if layer.batch <= 1:
                return Worth(ONE[layer.gradients], "one example reads open weights alone", "too many gates are open")
            few = f"{layer.batch} examples"
            below = 1 - (1 - READ) ** (1 / layer.batch)
            return Worth(below, f"{few} read open weights alone", f"{few} have most units open together")
        if layer.group >= GROUP and layer.group % SMALLEST_LIST == 0 and layer.batch >= BATCH and multiplied >= WORK:
            return Worth(RATE[layer.gradients], "groups whose examples fill tiles", "too many groups are open")
        return Worth(0.0, no="single units of many examples, or groups too small to fill tiles")

    @functools.cached_property
    def products(self) -> Any:
        """The products; importing them imports Triton."""
        return importlib.import_module("gatelet.kernels.backends.triton.products")
