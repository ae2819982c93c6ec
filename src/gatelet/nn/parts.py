"""The affine maps of a layer: read as weight and bias, or called as modules where an adapter or a hook was added to
them."""

import functools
import warnings
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.modules import module as _torch_module

from gatelet._checks import values_hidden
from gatelet.kernels.ops.turned import turned


class Affine(NamedTuple):
    """Weight (N, D) and bias (N,) or None."""

    weight: Tensor
    bias: Tensor | None


Part = Affine | nn.Module
"""An affine map; or a module, if something was added to it that only its own forward computes."""


def more_than_affine(module: Any) -> str | None:
    """Return what this module does besides x Wᵀ + b, so that its weight must not be read alone; None for nothing.

    Linear and GPT-2's Conv1D are known. A parametrization (``torch.nn.utils.parametrize``) acts when the weight is
    read, so it does not count.
    """
    if type(module) is not nn.Linear:
        kind = getattr(module, "dense_class", type(module))  # a converted map's: its gates are no part of its weight
        if isinstance(module, nn.Linear):
            if kind.forward is not nn.Linear.forward:
                return f"{kind.__name__} has a forward of its own"
        elif not (hasattr(module, "nf") and hasattr(module, "nx") and kind.__bases__ == (nn.Module,)):
            return f"it is a {kind.__name__}"
    state = module.__dict__
    if "forward" in state and was_replaced(module, "forward"):
        return "its forward was replaced"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "it has hooks"
    if _torch_module._has_any_global_hook():
        return "torch has hooks for all modules"
    return None


def was_replaced(module: nn.Module, method: str) -> bool:
    """Whether this module has its own method in place of its class's (what a removed hook leaves does not count)."""
    own = module.__dict__.get(method)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(module), method)


def part_of(module: Any) -> Part:
    """Return weight and bias of an affine map, or the module itself where something was added to it."""
    if more_than_affine(module) is not None:
        return cast(nn.Module, module)
    if type(module) is nn.Linear:  # from where nn.Module keeps them, without its search for attributes
        own = module._parameters
        return Affine(cast(Tensor, own["weight"]), own["bias"])
    weight = cast(Tensor, module.weight)
    return Affine(weight.t() if hasattr(module, "nf") else weight, cast(Tensor | None, module.bias))


def apply(part: Part, x: Tensor) -> Tensor:
    """Return x Wᵀ + b, with whatever was added to the map."""
    return F.linear(x, *part) if isinstance(part, Affine) else cast(Tensor, part(x))


def all_affine(*parts: Part | None) -> bool:
    """Whether the kernels can read all of these; if not, the reason is announced once."""
    others = [part for part in parts if part is not None and not isinstance(part, Affine)]
    for part in others:
        whole = getattr(part, "whole", part)  # of a map that is half of another
        _announce(type(whole).__name__, cast(str, more_than_affine(whole)))
    return not others


@functools.cache
def _announce(name: str, why: str) -> None:
    warnings.warn(
        f"gatelet.nn: a {name} of a conditional layer runs by its own forward, because {why}: closed units are "
        "computed and discarded, so nothing is saved",
        UserWarning,
        stacklevel=5,
    )


class _Laid(torch.autograd.Function):
    """A weight in the other layout: the same numbers, and the same gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, laid: Tensor) -> Tensor:
        ctx.by_rows = weight.is_contiguous()
        return laid.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        have = grad if ctx.by_rows else grad.t()
        if torch.is_grad_enabled() or type(grad) is not Tensor or have.is_contiguous():
            return grad, None
        # In the parameter's layout: torch would otherwise copy it so, more slowly.
        return (turned(grad.t()) if ctx.by_rows else turned(grad).t()), None


class _Kept(NamedTuple):
    """A copy; its source's memory, state and some of its numbers at that time."""

    source: StorageWeakRef
    state: tuple[Any, ...]
    copy: Tensor
    some: Tensor

    def holds(self, state: tuple[Any, ...], some: Tensor) -> bool:
        """Whether the source, as it is now, still says what was copied."""
        return not self.source.expired() and self.state == state and torch.equal(self.some, some)


class ByUnit:
    """Weights laid out so that each hidden unit's numbers lie together, which is how the kernels read them.

    Parameters are ordinary contiguous tensors; where a unit's numbers are a column of one, the layer keeps a copy
    beside it for calls without gradients, made again when the weight has changed: another tensor (a parametrization
    gives one at every call, often at the address of the last), another version, or, as writing to ``.data`` changes no
    version, other numbers among those that are looked at. :meth:`forget` (the
    layer's ``train()`` and ``eval()``) drops it. A pass with gradients copies anew, into the same memory unless a graph
    still holds it.
    """

    SAMPLE = 256

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self.prepared: Any = None  # what reads the copies where they lie

    def forget(self) -> None:
        """Drop the copies."""
        self._kept, self.prepared = {}, None

    def rows(self, key: str, weight: Tensor) -> Tensor:
        """Return W (N, D) with the rows together."""
        if weight.is_contiguous() or not _kernels_read(weight):
            return weight
        if torch.is_grad_enabled() and weight.requires_grad:
            return cast(Tensor, _Laid.apply(weight, self._copy(key, weight.detach(), new=True)))
        return self._copy(key, weight.detach())

    def columns(self, key: str, weight: Tensor) -> Tensor:
        """Return W (O, N) with the columns together."""
        if weight.t().is_contiguous() or not _kernels_read(weight):
            return weight
        if torch.is_grad_enabled() and weight.requires_grad:
            return cast(Tensor, _Laid.apply(weight, self._copy(key, weight.detach().t(), new=True).t()))
        return self._copy(key, weight.detach().t()).t()

    def _copy(self, key: str, view: Tensor, new: bool = False) -> Tensor:
        """Return a contiguous copy of the weight's transposed view, the one that is kept if it still holds."""
        now = (view.data_ptr(), view._version, view.shape, view.dtype)
        kept = self._kept.get(key)
        if not new and kept is not None and kept.holds(now, self._some(view)):
            return kept.copy.detach()
        with torch.inference_mode(False):  # for use in any mode
            copy = turned(view.t(), into=None if kept is None else _unused(kept.copy, view))
        self._kept[key] = _Kept(StorageWeakRef(view.untyped_storage()), now, copy, self._some(view).clone())
        return copy.detach()  # a tensor of its own: a graph that saves it is then seen to hold the memory

    def _some(self, view: Tensor) -> Tensor:
        """Return numbers spread over the whole matrix, along a diagonal that wraps around."""
        rows, width = view.shape
        step = max(1, rows * width // self.SAMPLE) | 1
        count = min(self.SAMPLE, (rows * width - 1) // step + 1)
        # The transposed view of a contiguous matrix: its storage is one line of numbers.
        return view.as_strided((count,), (step,), view.storage_offset())

    def __deepcopy__(self, memo: Any) -> "ByUnit":
        return ByUnit()

    def __reduce__(self) -> Any:
        return ByUnit, ()


def _unused(memory: Tensor, view: Tensor) -> Tensor | None:
    """Return the memory if a matrix like this one fits into it and nothing else holds it, no graph either."""
    fits = (memory.shape, memory.dtype, memory.device) == (view.shape, view.dtype, view.device)
    return memory if fits and torch._C._storage_Use_Count(memory.untyped_storage()._cdata) <= 2 else None


def _kernels_read(weight: Tensor) -> bool:
    """Whether it is an ordinary matrix on the CPU (GPU kernels read either layout; a graph is traced with its own)."""
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter) or values_hidden(weight):
        return False
    whole = weight.is_contiguous() or weight.t().is_contiguous()
    return weight.device.type == "cpu" and whole and weight.numel() > 0 and not weight.is_inference()
