"""SparseCode: the open latents of each example and their values."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from gatelet._checks import values_hidden
from gatelet.kernels.pattern import Lists, check_starts, watched


class SparseCode:
    """What :meth:`gatelet.nn.SparseAutoencoder.encode` returns: the open latents of each example and their values.

    With a fixed number of open latents, ``indices`` and ``values`` are (..., K). Else they are (P,), of all examples
    one after the other, and example b's are those from ``offsets[b]`` to ``offsets[b + 1]``, of the flattened lead.

    Args:
        indices: the open latents, int64.
        values: their values, differentiable; zero where a listed latent is closed.
        latents: N.
        lead: the examples' shape.
        offsets: (B + 1,), or None with a fixed number.

    >>> code = SparseCode(torch.tensor([[2, 0]]), torch.tensor([[0.5, 1.5]]), 3, torch.Size((1,)))
    >>> code.to_dense()
    tensor([[1.5000, 0.0000, 0.5000]])
    >>> code.l0
    tensor([2])
    """

    def __init__(
        self, indices: Tensor, values: Tensor, latents: int, lead: torch.Size, offsets: Tensor | None = None
    ) -> None:
        self.latents, self.lead = latents, lead
        self._indices, self._values, self._offsets = indices, values, offsets
        self._dense: Tensor | None = None

    @classmethod
    def from_dense(cls, dense: Tensor, lead: torch.Size) -> "SparseCode":
        """Return the code of dense values (B, N); lists are made only when they are read."""
        code = cls(dense, dense, dense.shape[1], lead)
        code._dense = dense
        return code

    def _list(self) -> None:
        if self._dense is not None and self._indices is self._dense:
            examples, self._indices = self._dense.detach().nonzero(as_tuple=True)
            self._values = self._dense[examples, self._indices]
            self._offsets = F.pad(torch.bincount(examples, minlength=len(self._dense)).cumsum(0), (1, 0))

    @property
    def indices(self) -> Tensor:
        """The open latents, (..., K) or (P,)."""
        self._list()
        return self._indices

    @property
    def values(self) -> Tensor:
        """Their values, of the same shape."""
        self._list()
        return self._values

    @property
    def offsets(self) -> Tensor | None:
        """Where each example's latents begin, (B + 1,); None with a fixed number of them."""
        self._list()
        return self._offsets

    @property
    def dense(self) -> Tensor | None:
        """The dense values (B, N) that the code was made of, if it was."""
        return self._dense

    @property
    def single(self) -> bool:
        """Whether it is the code of one example, with a fixed number of open latents, by the shapes of its parts."""
        shape = self._indices.shape
        known = self._dense is None and self._offsets is None and shape == self._values.shape
        return known and shape[:-1] == self.lead and self.lead.numel() == 1

    def check(self) -> None:
        """Raise unless indices, values and offsets fit each other; the kernels read memory by them.

        Raises:
            ValueError, TypeError: if they do not. On a GPU, values are not looked at.
        """
        if self._dense is not None:
            return
        indices, shape = self._indices, tuple(self._indices.shape)
        if indices.dtype != torch.int64:
            raise TypeError(f"code: its indices must be int64, not {indices.dtype}")
        if tuple(self._values.shape) != shape:
            raise ValueError(f"code: has indices {shape}, but values {tuple(self._values.shape)}")
        if self._offsets is None and shape[:-1] != tuple(self.lead):
            raise ValueError(f"code: has indices {shape}, which is not (..., K) for examples {tuple(self.lead)}")
        if self._offsets is not None and self._offsets.shape != (self.lead.numel() + 1,):
            raise ValueError(f"code: has {len(self._offsets)} offsets, but {self.lead.numel()} examples")
        hidden = torch.compiler.is_compiling() or values_hidden(indices)
        if indices.device.type != "cpu" or hidden or not indices.numel():
            return
        if self._offsets is not None:
            check_starts(self._offsets, len(indices), "code: its offsets")
        low, high = (int(each) for each in indices.aminmax())
        if low < 0 or high >= self.latents:
            wrong = low if low < 0 else high
            raise ValueError(f"code: its indices must lie in 0 … {self.latents - 1}, but {wrong} is among them")

    def lists(self) -> Lists:
        """Return the open latents as one list with offsets."""
        if self.offsets is not None:
            return Lists(self.offsets, self.indices, self.latents, watched=watched(self.offsets, self.indices))
        k = self.indices.shape[-1]
        offsets = torch.arange(0, self.indices.numel() + 1, k, device=self.indices.device)
        return Lists(offsets, self.indices.reshape(-1), self.latents, watched=watched(self.indices))

    @property
    def l0(self) -> Tensor:
        """How many latents have a value that is not zero, per example (...)."""
        if self._dense is not None:
            return (self._dense != 0).sum(-1).view(self.lead)
        if self._offsets is None:
            return (self._values != 0).sum(-1)
        counts = (self._values != 0).long()
        return counts.new_zeros(self.lead.numel()).index_add_(0, self.lists().examples(), counts).view(self.lead)

    def opened(self) -> Tensor:
        """Return which latents any example opened, (N,) booleans."""
        if self._dense is not None:
            return (self._dense.detach() != 0).any(0)
        found = torch.zeros(self.latents, dtype=torch.bool, device=self._values.device)
        return found.index_fill_(0, self._indices[self._values.detach() != 0], True)

    def to_dense(self) -> Tensor:
        """Return the code as a dense tensor (..., N)."""
        if self._dense is not None:
            return self._dense.view(*self.lead, self.latents)
        lists = self.lists()
        dense = self.values.new_zeros((lists.batch, self.latents))
        return dense.index_put((lists.examples(), lists.units), self.values.reshape(-1)).view(*self.lead, self.latents)

    def to_sparse_csr(self) -> Tensor:
        """Return the code as a sparse CSR tensor (B, N) without gradient: no zeros, latents in ascending order."""
        lists, values = self.lists(), self.values.detach().reshape(-1)
        kept = values != 0
        key, order = (lists.examples() * self.latents + lists.units)[kept].sort()
        starts = F.pad(torch.bincount(key // self.latents, minlength=lists.batch).cumsum(0), (1, 0))
        size = (lists.batch, self.latents)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(
                starts, key % self.latents, values[kept][order], size, check_invariants=False
            )

    def __repr__(self) -> str:
        kind = "dense" if self._dense is not None else "ragged" if self._offsets is not None else "even"
        return f"SparseCode({kind}, lead={tuple(self.lead)}, latents={self.latents})"
