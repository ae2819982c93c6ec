"""Weight gradients of only the rows that are open for any example, where the open units were given as lists."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gatelet.kernels.backends import _pairs
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


def touched(run: Any) -> Callable[..., Tensor]:
    """Return the backend's product that gives sparse rows, or the one in plain PyTorch."""
    found: Callable[..., Tensor] = getattr(run, "touched", _pairs.touched)
    return found
