"""A threshold per token from the mean and the spread of its logits: about k open gates without sorting."""

from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_rate
from gatelet.sparsity._controller import Controller


class StatisticalTopK(Controller):
    """Holds about the same number of open gates in every token, by the threshold that a Gaussian would need.

    Of N logits with mean m and standard deviation s, about k exceed θ = m + s·Φ⁻¹(1 − k/N); the gates are drawn from
    a − θ. One pass over the logits, where the k-th largest would need a sort. Exact in the limit of many Gaussian
    logits; for other distributions :func:`gatelet.sparsity.calibrate_thresholds` corrects the average share. The
    gradient passes through m and s, so raising all logits of a token alike opens nothing.

    Args:
        target_rate: k/N.

    Raises:
        ValueError: for a rate outside (0, 1).

    >>> import torch
    >>> logits = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(0))
    >>> logits = logits * torch.tensor([[1.0], [5.0], [9.0]]) + 3
    >>> (StatisticalTopK(0.1).shift(logits) > 0).float().mean(-1).round(decimals=2)
    tensor([0.1000, 0.1000, 0.1000])

    Reference: C. You, K. Wu, Z. Jia, L. Chen, S. Bhojanapalli et al., "Spark Transformer: Reactivating Sparsity in FFN
    and Attention", 2025, arXiv:2506.06644.
    """

    def __init__(self, target_rate: float) -> None:
        super().__init__()
        self.target_rate = check_rate(target_rate)
        self.quantile = NormalDist().inv_cdf(1 - self.target_rate)

    def shift(
        self, logits: Float[Tensor, "*lead N"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*lead N"]:
        """Return a − θ."""
        spread, mean = torch.std_mean(logits, -1, correction=0, keepdim=True)
        return logits - (mean + self.quantile * spread)

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"target_rate={self.target_rate:g}"
