"""Which of a layer's units this process holds: all of them, unless :func:`gatelet.nn.spread` spread them."""

import torch
from torch import Tensor

from gatelet.nn.sparse_code import SparseCode


class Units:
    """All units are here; ``gatelet.nn._spread.Spread`` says what each method does where they are not."""

    processes, rank = 1, 0

    def own(self, parameter: Tensor) -> Tensor:
        """Return this process's part of a parameter."""
        return parameter

    def enter(self, x: Tensor) -> Tensor:
        """Return what all processes have, for the units that are here."""
        return x

    def total(self, part: Tensor) -> Tensor:
        """Return the sum over the processes."""
        return part

    def gather(self, part: Tensor, dim: int = -1) -> Tensor:
        """Return all processes' parts."""
        return part

    def slice(self, whole: Tensor) -> Tensor:
        """Return this process's part of the last dimension."""
        return whole

    def place(self, part: Tensor) -> Tensor:
        """Return numbers of the units that are here among zeros for all others."""
        return part

    def largest(self, values: Tensor, k: int) -> Tensor:
        """Return which of these values (B, k') are among the k largest of all processes', per example."""
        return torch.ones_like(values, dtype=torch.bool)

    def whole(self, code: SparseCode) -> SparseCode:
        """Return the code of all latents."""
        return code

    def part(self, code: SparseCode) -> SparseCode:
        """Return the part of a code that belongs to the latents that are here."""
        return code

    def same_noise(self, device: torch.device) -> None:
        """Let all processes draw the same noise."""


ALL_HERE = Units()
