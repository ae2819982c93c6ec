"""Supplement A.2: Beta noise in the argument of a sigmoid gate, which pushes it to decide."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_finite, check_rate
from gatelet.estimators._noise import given
from gatelet.sparsity._controller import Controller


class BetaNoise(Controller):
    """Adds skewed noise to the logits in training, so that a gate gains nothing by staying near the target rate.

    a ← a + c·(z − ½), z ~ Beta(α, β), α = (s(β − 2) + 1)/(1 − s), so that the mode of z is s, and
    c = |log(1/s² − 1)| (A.2). In ``eval()`` z is replaced by its mean α/(α + β).
    (The shift at the mode is σ⁻¹(0.137) for s = 0.1, not σ⁻¹(0.1) as the supplement suggests.)

    Args:
        target_rate: s.
        beta: β; the paper found 40.1 best.

    Raises:
        ValueError: for a rate outside (0, 1), or β not above 1.

    >>> import torch
    >>> noise = BetaNoise(0.1).eval()
    >>> noise.shift(torch.zeros(1))
    tensor([-1.7572])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, supplement A.2.
    """

    quantiles: Tensor

    def __init__(self, target_rate: float, beta: float = 40.1) -> None:
        super().__init__()
        self.target_rate = s = check_rate(target_rate)
        if check_finite(beta, "beta") <= 1:
            raise ValueError(f"beta must be a finite number above 1, not {beta!r}")
        self.beta = beta
        self.alpha = (s * (beta - 2) + 1) / (1 - s)
        self.scale = abs(math.log(1 / s**2 - 1))
        # Not a buffer: it follows from the arguments, and to_empty() would leave it undefined.
        self._quantiles = beta_quantiles(self.alpha, beta)

    def shift(
        self,
        logits: Float[Tensor, "*lead N"],
        noise: Float[Tensor, "*lead N"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*lead N"]:
        """Return the logits plus the noise z ~ Beta(α, β), shifted and scaled; plus its mean in ``eval()``."""
        if not self.training:
            return logits + self.scale * (self.alpha / (self.alpha + self.beta) - 0.5)
        if noise is None:
            noise = self.draw_noise(logits, generator)
        return logits + (self.scale * (noise - 0.5)).to(logits.dtype)

    def draw_noise(
        self, logits: Float[Tensor, "*lead N"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*lead N"]:
        """Draw z ~ Beta(α, β), by interpolating the table of its quantiles at a uniform number."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        uniform = torch.rand(logits.shape, dtype=dtype, device=logits.device, **given(generator))
        if self._quantiles.device != logits.device:
            self._quantiles = self._quantiles.to(logits.device)
        position = uniform * (self._quantiles.numel() - 1)
        # The product may round up to the last index.
        below = position.long().clamp_(max=self._quantiles.numel() - 2)
        quantiles = self._quantiles.to(dtype)
        return torch.lerp(quantiles[below], quantiles[below + 1], position - below)

    def extra_repr(self) -> str:
        """Show the rate and β."""
        return f"target_rate={self.target_rate:g}, beta={self.beta:g}"


def beta_quantiles(alpha: float, beta: float, size: int = 1 << 14) -> Float[Tensor, "size"]:
    """Return the quantiles of Beta(α, β) at ``size`` equally spaced probabilities from 0 to 1.

    The density is summed on a fine grid and its running sum inverted, to within 1e-6 of the
    true quantiles. Drawing from the table is several times faster than drawing two gamma variables per gate.
    """
    edges = torch.linspace(0, 1, 1 << 17, dtype=torch.float64, device="cpu")  # whatever the default device is
    middle = (edges[1:] + edges[:-1]) / 2
    log_density = (alpha - 1) * middle.log() + (beta - 1) * torch.log1p(-middle)
    mass = (log_density - log_density.max()).exp()
    cumulative = torch.cat([mass.new_zeros(1), mass.cumsum(0)]) / mass.sum()
    # The ends 0 and 1 would spread the outermost bins over the law's empty tails; an eighth of a bin keeps their mean.
    probability = torch.linspace(0, 1, size, dtype=torch.float64, device="cpu").clamp(0.125 / size, 1 - 0.125 / size)
    above = torch.searchsorted(cumulative, probability).clamp(1, len(edges) - 1)
    step = (cumulative[above] - cumulative[above - 1]).clamp_min(torch.finfo(torch.float64).tiny)
    share = ((probability - cumulative[above - 1]) / step).clamp(0, 1)
    return torch.lerp(edges[above - 1], edges[above], share).float()
