"""Given lists of open units: their backend, and weight gradients of only the rows that are open for any example."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gatelet.kernels import choose
from gatelet.kernels.backends import Layer, _pairs
from gatelet.kernels.ops._declare import transformed
from gatelet.kernels.pattern import Form, Lists


def listed(pattern: Form | None) -> bool:
    """Whether the pattern is one of lists."""
    return isinstance(pattern, Lists)


def refuse_sparse(sparse_grad: bool, ordinary: bool) -> None:
    """Raise where torch cannot pass a sparse gradient on."""
    if sparse_grad and not ordinary:
        raise NotImplementedError(
            "sparse_grad=True does not work under torch.compile, torch.export and torch.func transforms"
        )


def backend_for(backend: str, layer: Layer, *tensors: Tensor | None) -> str:
    """Return the backend for given lists. Under a transform, which no kernel supports, ``"auto"`` is dense."""
    return "dense" if backend == "auto" and transformed(*tensors) else choose.choose_for_lists(backend, layer)


def touched(run: Any) -> Callable[..., Tensor]:
    """Return the backend's product that gives sparse rows, or the one in plain PyTorch."""
    found: Callable[..., Tensor] = getattr(run, "touched", _pairs.touched)
    return found
