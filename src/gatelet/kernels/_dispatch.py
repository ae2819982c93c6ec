"""Which backend runs, and why."""

import functools
import importlib.util
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatelet._checks import check_choice
from gatelet.kernels._pattern import flat, mask_of

BACKENDS = ("auto", "reference", "numba", "triton")
Kernel = Literal["reference", "unit", "group"]
NATIVE = (torch.float32, torch.float64)
SMALLEST_GROUP = 4
"""Groups of at least so many units go through the group kernel, which multiplies four units at a time."""


@dataclass(frozen=True)
class Choice:
    """What ``backend="auto"`` decided.

    Attributes:
        backend: ``"reference"`` (dense, in PyTorch), ``"numba"`` or ``"triton"``.
        kernel: ``"reference"``, ``"unit"`` or ``"group"``.
        active_fraction: the share of open gates it measured, on a sample of examples, or was told; None where it did
            not look.
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
        # Put into words when asked, for that takes longer than to decide.
        side = "over" if self.backend == "reference" else "under"
        return f"{self.active_fraction:.1%} of the gates are open, {side} break-even at {self.limit:.0%}"


_known = functools.cache(Choice)
"""Choices that no number goes into: made once, for a small layer takes no longer than some objects do."""

SMALL = 1 << 16
"""Layers of fewer multiply-adds than this run dense: they are over before it matters, and nothing needs compiling."""
PAIR, PLACE = 90, 50
"""What an open pair costs beside its D multiply-adds, and what any pair costs, in dense multiply-adds: for the first
its sum, bias and gate, for the second its bit in the pattern and the zero in its place."""
FEW = 8
"""For so few examples the kernels win at any active fraction: dense products are then bound by reading weights too."""
NEAR = 1 << 22
"""Bytes of weights that stay in the near caches: dense products do not wait for them, so few examples are no excuse."""
SAMPLE = 1 << 12
"""Gates that are looked at to measure the active fraction."""


@functools.cache
def numba_missing() -> str | None:
    """Return why the Numba backend cannot run, None if it can. Nothing is imported to find out."""
    return None if importlib.util.find_spec("numba") else "numba is not installed"


@functools.cache
def triton_missing() -> str | None:
    """Return why the Triton backend cannot run anywhere, None if it can. Nothing is imported to find out."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed (pip install 'gatelet[triton]')"
    if not torch.cuda.is_available() and not _interpreted():
        return "there is no CUDA device"
    return None


def _interpreted() -> bool:
    # Triton's own switch, which must stand in the environment before triton is imported.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "on", "true")


def triton_cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton's kernels cannot run on this device with this dtype, None if they can."""
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return (
            f"the tensors are on {device}, but the kernels run on CUDA devices (and, for tests, on the CPU with "
            "TRITON_INTERPRET=1 set before triton is imported)"
        )
    return None if dtype in GPU_NATIVE else f"there is no kernel for {dtype}"


@functools.cache
def _announce_missing(missing: str) -> None:
    warnings.warn(
        f"gatelet.kernels: on CUDA devices closed units are computed and discarded, because {missing}",
        UserWarning,
        stacklevel=4,
    )


@functools.cache
def _announce(dtype: torch.dtype) -> None:
    warnings.warn(
        f"gatelet.kernels: {dtype} runs on the dense reference path; the CPU kernels are for float32 and float64",
        UserWarning,
        stacklevel=4,
    )


def active_fraction(gate: Tensor) -> float:
    """Return the share of open gates, from rows spread evenly over the batch."""
    step = max(1, gate.numel() // SAMPLE)
    sample = gate[:: min(step, max(gate.shape[0], 1))] if step > 1 else gate
    return float(sample.count_nonzero()) / max(sample.numel(), 1)


@dataclass(frozen=True)
class Costs:
    """What a kernel takes on this machine, as a multiple of the dense product: ``fixed`` + ``slope`` · active fraction.

    For many features; for D of them every pair costs :data:`PLACE` and every open one :data:`PAIR` multiply-adds more.
    """

    fixed: float
    slope: float


@functools.cache
def costs(kernel: Kernel, dtype: torch.dtype) -> Costs:
    """Measure what the kernel costs on this machine, once per process (some 30 ms): the ratio is the machine's.

    One core of a desktop does two multiply-adds per load, another one: dense products run at twice the speed on the
    first, sparse ones, bound by loads, do not.
    """
    from gatelet.kernels.gated_linear import _numba, _reference

    batch, width, units = 128, 512, 512
    with torch.inference_mode():
        x = torch.ones(batch, width, dtype=dtype, device="cpu")
        weight = torch.ones(units, width, dtype=dtype, device="cpu")
        # Every k-th gate, shifted from row to row: as irregular for the kernels as random ones, without a generator.
        places = torch.arange(batch * units // (1 if kernel == "unit" else 64), device="cpu")
        ways: list[Callable[[], Tensor]] = [lambda: _reference.forward(x, weight, None, torch.ones_like(x), False)[0]]
        rates = (0.125, 0.75)
        for rate in rates:
            gate = ((places * 0.6180339887498949) % 1 < rate).to(dtype).view(batch, -1)
            ways.append(functools.partial(_numba.infer, x, weight, None, gate))
        best = [math.inf] * len(ways)
        for _ in range(15):
            for index, way in enumerate(ways):
                start = time.perf_counter()
                way()
                best[index] = min(best[index], time.perf_counter() - start)
    dense, low, high = best
    slope = (high - low) / (rates[1] - rates[0]) / dense
    fixed = low / dense - slope * rates[0]
    # Within what machines can be: other processes may have disturbed every one of these short measurements.
    return Costs(min(max(fixed - PLACE / width, 0.0), 0.4), min(max(slope / (1 + PAIR / width), 0.5), 3.0))


def limit(kernel: Kernel, batch: int, width: int, units: int, dtype: torch.dtype, gradients: bool) -> float:
    """Return the active fraction below which this kernel is expected to beat dense."""
    if batch <= FEW:
        return 1.0
    # Two of the three products of a training step are those of units: only the forward pass has a kernel for groups.
    cost = costs("unit" if gradients else kernel, dtype)
    # The products of the backward pass form no pattern and finish no pairs, but they write: a weight's gradient is as
    # large as the weight, however few the examples.
    each = 2 * width if gradients else width
    few = FEW if not gradients and units * width * dtype.itemsize >= NEAR else 0
    left = max(1 - cost.fixed - PLACE / each, 0.0)
    return min(1.0, left / (cost.slope * (1 + PAIR / each)) + few / batch)


def check_backend(backend: str) -> str:
    """Return the backend's name if it is known and there."""
    check_choice(backend, BACKENDS, "backend")
    if backend == "triton" and (missing := triton_missing()):
        raise RuntimeError(f'backend="triton": {missing}')
    if backend == "numba" and (missing := numba_missing()):
        raise RuntimeError(f'backend="numba": {missing}')
    return backend


def choose(
    backend: str,
    gate: Tensor,
    width: int,
    units: int,
    dtype: torch.dtype,
    gradients: bool,
    batch: int | None = None,
    announce: bool = True,
    declared: float | None = None,
) -> Choice:
    """Decide for gates (B, G), or a sample of ``batch``; D = ``width`` and N = ``units``, of each product.

    ``declared`` is the active fraction to expect where looking at the gates would make a GPU wait.
    """
    batch = gate.shape[0] if batch is None else batch
    group = units // max(gate.shape[1], 1)
    kernel: Kernel = "group" if group >= SMALLEST_GROUP else "unit"
    if backend == "reference":
        return _known("reference", "reference", None, 0.0, "asked for")
    if backend == "triton":
        if reason := triton_cannot(gate.device, dtype):
            raise ValueError(f'backend="triton": {reason}')
        return _known("triton", kernel, None, 1.0, "asked for")
    if gate.device.type == "cuda" and backend == "auto":
        return choose_on_gpu(kernel, group, batch, width, units, dtype, gradients, announce, declared)
    if dtype not in NATIVE:
        if announce:
            _announce(dtype)
        return Choice("reference", "reference", None, 0.0, f"no kernel for {dtype}")
    if backend == "numba":
        if gate.device.type != "cpu":
            raise ValueError(f'backend="numba" runs on the CPU, but the tensors are on {gate.device}')
        return _known("numba", kernel, None, 1.0, "asked for")
    if gate.device.type != "cpu":
        return Choice("reference", "reference", None, 0.0, f"no kernel for the device {gate.device}")
    if missing := numba_missing():
        return Choice("reference", "reference", None, 0.0, missing)
    if batch * units * width < SMALL:
        return _known("reference", "reference", None, 0.0, "so small that starting a kernel costs more than it saves")
    most = limit(kernel, batch, width, units, dtype, gradients)
    if most == 1.0:
        return _known("numba", kernel, None, most, "the kernel is faster at any active fraction")
    rate = active_fraction(gate)
    if rate <= most:
        return Choice("numba", kernel, rate, most)
    return Choice("reference", "reference", rate, most)


# The rule for CUDA devices. Not measured on a GPU: chosen from counts of bytes and operations (docs/gpu.md) so that the
# kernels are taken only where they have several times less of both than dense, and dense runs otherwise.
GPU_FEW = 16
"""At most so many examples: programs read only the rows of open units, and the time is that of reading them."""
SMALLEST_LIST = 16
"""Groups of at least so many units are multiplied by lists of their examples; a tile of tensor cores is no smaller."""
GPU_NATIVE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPU_BYTES = 1 << 25
"""Smaller weights are read by a large GPU in about the time of starting the kernels."""
GPU_READ = 0.5
"""The most of the weights that few examples may read: what is open for any of them."""
GPU_GROUP, GPU_BATCH = 64, 512
"""The least group, and number of examples, that fill tiles: at 10 % open, 51 examples per group."""
GPU_RATE = {False: 0.25, True: 0.15}
"""The largest active fraction at which groups run sparse, without and with a backward pass."""


def choose_on_gpu(
    kernel: Kernel,
    group: int,
    batch: int,
    width: int,
    units: int,
    dtype: torch.dtype,
    gradients: bool,
    announce: bool,
    declared: float | None,
) -> Choice:
    """Decide on a CUDA device from shapes and the declared active fraction: the gates are not looked at."""

    def dense(reason: str, most: float = 0.0) -> Choice:
        return Choice("reference", "reference", declared, most, reason)

    if missing := triton_missing():
        if announce:
            _announce_missing(missing)
        return dense(missing)
    if dtype not in GPU_NATIVE or dtype == torch.float64:
        return dense(f"dense is faster in {dtype}")
    if declared is None:
        return dense("no active_fraction was declared, and looking at the gates would make the GPU wait")
    if units * width * dtype.itemsize < GPU_BYTES:
        return dense("so small that starting the kernels costs more than they save")
    if batch <= GPU_FEW and not gradients:
        most = 1 - (1 - GPU_READ) ** (1 / max(batch, 1))
        if declared <= most:
            return Choice("triton", kernel, declared, most, f"{batch} examples read open weights alone")
        return dense(f"{batch} examples have most units open together", most)
    if group >= GPU_GROUP and group % SMALLEST_LIST == 0 and batch >= GPU_BATCH:
        most = GPU_RATE[gradients]
        if declared <= most:
            return Choice("triton", kernel, declared, most, "groups whose examples fill tiles")
        return dense("too many groups are open", most)
    return dense("single units of many examples, or groups too small to fill tiles")


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors outside of tracing and transforms, so that kernels may be called directly."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(t is None or type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)
    )


def recording(*tensors: Tensor | None) -> bool:
    """Whether autograd records what happens to these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def recorded(forward: Any, save: Any, backward: Any) -> Any:
    """Return an op's autograd for ordinary tensors: what torch.library would do, at a quarter of its cost per call."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    return Recorded.apply


def one_layout(gradients: Any) -> Any:
    """Return the function with contiguous results, whatever the backend: a fake can only promise one layout."""

    @functools.wraps(gradients)
    def contiguous(*args: Any) -> Any:
        return tuple(each.contiguous() for each in gradients(*args))

    return contiguous


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """Raise under ``torch.vmap`` and ``torch.func.grad``, whose wrapped tensors no kernel can read."""
    if torch.compiler.is_compiling():
        return
    if any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        raise NotImplementedError(
            f"{op} does not work under torch.vmap and torch.func transforms; instead of vmap give x and gate the "
            "extra dimension as a leading one, instead of torch.func.grad use torch.autograd.grad"
        )


def settled(backend: str, x: Tensor) -> str:
    """Return the backend as far as it can be known without looking at values (inside tracing and transforms)."""
    if backend == "auto" and (x.dtype not in NATIVE or x.device.type != "cpu" or numba_missing()):
        return "reference"
    return backend


def runs_triton(backend: str, tensor: Tensor) -> bool:
    """Whether Triton builds the pattern for this backend: on CUDA devices, wherever it is there."""
    if backend == "auto":
        return tensor.device.type == "cuda" and triton_missing() is None and tensor.dtype in GPU_NATIVE
    return backend == "triton"


def runs_numba(backend: str, tensor: Tensor) -> bool:
    """Whether Numba builds the pattern for this backend: it costs little, so ``"auto"`` builds it whatever follows."""
    return backend not in ("reference", "triton") and settled("auto", tensor) == "auto"


def choose_by_pattern(backend: str, rows: Tensor, hidden: Tensor, weight: Tensor) -> Choice:
    """Decide for a hidden layer (B, N) whose pattern is known, and W (O, N)."""
    if backend != "auto" or hidden.dtype not in NATIVE or hidden.device.type != "cpu":
        gate = hidden
    else:  # a sample's bits stand for the gates
        step = max(1, hidden.numel() // SAMPLE)
        gate = mask_of(rows[:: min(step, max(len(rows), 1))], hidden.shape[1])
    return choose(backend, gate, weight.shape[0], weight.shape[1], hidden.dtype, False, batch=hidden.shape[0])


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
    'reference'
    """
    check_backend(backend)
    if gradients is None:
        gradients = recording(x, weight, gate)
    found = flat(gate.detach())
    sizes = (weight.shape[1], weight.shape[0])
    return choose(backend, found, *sizes, x.dtype, gradients, announce=False, declared=active_fraction)
