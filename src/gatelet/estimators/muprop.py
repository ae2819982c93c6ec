"""The score function of the remainder of a first-order expansion around the mean field."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import Evaluating, Objective, evaluate
from gatelet.estimators._noise import wide


class MuProp(Evaluating):
    """Score function of the loss minus its Taylor expansion at the mean gates, whose own gradient is known exactly.

    With μ = σ(a) and s = ∂L/∂h at h = μ:
    ĝ = (1/K) Σ_k (h_k − μ)·(L_k − L(μ) − s·(h_k − μ)) + s ∘ μ(1 − μ).

    Bias: none; the expansion is subtracted under the expectation and its expected gradient, s ∘ μ(1 − μ), added.
    Variance: zero for a loss linear in the gates, that of the remainder otherwise. Large where L at fractional
    gates has little to do with L at 0 and 1.

    The objective must be defined for gates between 0 and 1, differentiable in them by ``torch.func.grad``. Cost: K + 1
    evaluations and one gradient.

    >>> import torch
    >>> a = torch.zeros(1, 2, requires_grad=True)
    >>> value = MuProp().surrogate(lambda h: h @ torch.tensor([2.0, 4.0]), a, torch.tensor([[[0.4, 0.6]]]))
    >>> value.sum().backward()
    >>> a.grad                                                        # linear: w·σ(a)(1 − σ(a)), at any noise
    tensor([[0.5000, 1.0000]])

    Reference: S. Gu, S. Levine, I. Sutskever, A. Mnih, "MuProp: Unbiased Backpropagation for Stochastic Neural
    Networks", 2015, arXiv:1511.05176.
    """

    unbiased = True
    reference = "Gu, Levine, Sutskever, Mnih 2015, arXiv:1511.05176"

    def estimate(
        self,
        objective: Objective,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *batch"],
        noise: Float[Tensor, "..."],
    ) -> Float[Tensor, "K *lead N"]:
        """Return the score of the remainder, and the expansion's own gradient."""

        def mean_field(mean: Tensor) -> tuple[Tensor, Tensor]:
            at = mean.to(logits.dtype).unsqueeze(0)
            value = evaluate(objective, at, self.event_dims, differentiable=True).squeeze(0)
            return value.sum(), value

        exact = logits[0].to(wide(logits)).contiguous()
        mean = exact.sigmoid()
        slope, centre = torch.func.grad(mean_field, has_aux=True)(mean)
        difference = gates.to(mean.dtype) - mean
        remainder = losses.to(mean.dtype) - centre - (slope * difference).sum(-1)
        estimate: Tensor = difference * remainder.unsqueeze(-1) + slope * mean * (-exact).sigmoid()
        return estimate
