"""Pairs of samples that share their noise, u and 1 − u: ARM, and DisARM, which integrates it out."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import Sampled


class _Antithetic(Sampled):
    """Replicas k and k + K/2 have the gates 1[u_k < σ(a)] and 1[1 − u_k < σ(a)]."""

    unbiased = True
    replicas = 2
    antithetic = True
    several_layers = False

    def forward(
        self, logits: Float[Tensor, "K *lead N"], noise: Float[Tensor, "half *lead N"]
    ) -> Float[Tensor, "K *lead N"]:
        """Return the samples, pairs K/2 rows apart; they carry no gradient."""
        # The replicas of one layer have the same logits: one row of probabilities is enough.
        p = self.probability(logits[:1].detach().to(noise.dtype))
        return self.form.sample(logits, torch.cat([noise, 1 - noise]), p.expand(logits.shape))


class ARM(_Antithetic):
    """Difference of the losses of an antithetic pair, weighted by their noise (augment, REINFORCE, merge).

    ĝ = (2/K) Σ_k (L(1[1 − u_k < σ(a)]) − L(1[u_k < σ(a)]))·(u_k − ½), over K/2 pairs.

    Bias: none, for one layer of independent units.
    Variance: what the losses of a pair have in common cancels, as with a baseline; yet every unit, also one
    whose two gates agree, receives the difference times its noise. :class:`DisARM` never has more.

    >>> import torch
    >>> unit = ARM()
    >>> a, noise = torch.zeros(2, 1, 1), torch.tensor([[[0.3]]])
    >>> h = unit(a, noise)                                            # 1 and 0
    >>> unit.coefficients(a, h, torch.tensor([[3.0], [1.0]]), noise).flatten()        # (1 − 3)·(0.3 − ½)
    tensor([0.4000, 0.4000])

    Reference: M. Yin, M. Zhou, "ARM: Augment-REINFORCE-Merge Gradient for Stochastic Binary Networks", 2018,
    arXiv:1807.11143.
    """

    reference = "Yin, Zhou 2018, arXiv:1807.11143"

    def coefficients(
        self,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *lead"],
        noise: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "K *lead N"]:
        """Return (L' − L)·(u − ½) for both replicas of a pair."""
        if noise is None:
            raise ValueError("noise: ARM's estimate is a function of the noise of its gates")
        first, second = losses.chunk(2)
        return _for_both((second - first).unsqueeze(-1) * (noise.to(losses.dtype) - 0.5))


class DisARM(_Antithetic):
    """Difference of the losses of an antithetic pair, sent to the units whose gates differ (also known as U2G).

    ĝ = (2/K) Σ_k ½(L(h_k) − L(h'_k))·(h_k − h'_k)·σ(|a|), over K/2 pairs h_k = 1[u_k < σ(a)],
    h'_k = 1[1 − u_k < σ(a)]: the mean of ARM over the noise, given the gates.

    Bias: none, for one layer of independent units.
    Variance: at most ARM's, of which it is a conditional expectation. No state. The pairs are averaged.

    >>> import torch
    >>> unit = DisARM()
    >>> a = torch.zeros(2, 1, 1)
    >>> h = unit(a, torch.tensor([[[0.3]]]))                          # 1 and 0
    >>> unit.coefficients(a, h, torch.tensor([[3.0], [1.0]])).flatten()               # ½(3 − 1)·½
    tensor([0.5000, 0.5000])

    Reference: Z. Dong, A. Mnih, G. Tucker, "DisARM: An Antithetic Gradient Estimator for Binary Latent Variables",
    2020, arXiv:2006.10680; M. Yin, N. Ho, B. Yan, X. Qian, M. Zhou, "Probabilistic Best Subset Selection via
    Gradient-Based Optimization", 2020, arXiv:2006.06448.
    """

    reference = "Dong, Mnih, Tucker 2020, arXiv:2006.10680; Yin, Ho, Yan, Qian, Zhou 2020, arXiv:2006.06448"

    def coefficients(
        self,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *lead"],
        noise: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "K *lead N"]:
        """Return ½(L − L')·(h − h')·σ(|a|) for both replicas of a pair."""
        first, second = losses.chunk(2)
        one, other = gates.to(losses.dtype).chunk(2)
        larger = logits[: len(one)].to(losses.dtype).abs().sigmoid()
        return _for_both((first - second).unsqueeze(-1) / 2 * (one - other) * larger)


def _for_both(estimate: Float[Tensor, "half *lead N"]) -> Float[Tensor, "K *lead N"]:
    """Return each pair's estimate for its two replicas; of a single pair nothing is copied."""
    return estimate.expand(2, *estimate.shape).flatten(0, 1)
