"""Supplement A.2: Beta noise in the argument of a sigmoid gate, which pushes it to decide."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_rate
from gatelet.sparsity._controller import Controller


class BetaNoise(Controller):
    """Adds skewed noise to the logits in training, so that hovering at the target rate does not pay.

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

    def __init__(self, target_rate: float, beta: float = 40.1) -> None:
        super().__init__()
        self.target_rate = s = check_rate(target_rate)
        if not math.isfinite(beta) or beta <= 1:
            raise ValueError(f"beta must be a finite number above 1, not {beta!r}")
        self.beta = beta
        self.alpha = (s * (beta - 2) + 1) / (1 - s)
        self.scale = abs(math.log(1 / s**2 - 1))

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
        """Draw z ~ Beta(α, β) as x/(x + y) of two gamma variables."""
        shape, dtype = logits.shape, torch.promote_types(logits.dtype, torch.float32)
        x = torch._standard_gamma(torch.full(shape, self.alpha, dtype=dtype, device=logits.device), generator)
        y = torch._standard_gamma(torch.full(shape, self.beta, dtype=dtype, device=logits.device), generator)
        return x / (x + y)

    def extra_repr(self) -> str:
        """Show the rate and β."""
        return f"target_rate={self.target_rate:g}, beta={self.beta:g}"
