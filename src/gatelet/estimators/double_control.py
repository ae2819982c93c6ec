"""Leave-one-out whose losses have their first-order expansion subtracted, by the other samples' gradients."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_finite
from gatelet.estimators._base import Evaluating, Objective, evaluate
from gatelet.estimators._noise import wide


class DoubleControlVariates(Evaluating):
    """Leave-one-out score function of the losses minus what the other samples' gradients predict.

    p = σ(a), g_{−k} the mean of ∂L/∂h at the other samples, c_k = α·g_{−k}·(h_k − p):
    ĝ = (1/K) Σ_k [((L_k − c_k) − mean_{j≠k}(L_j − c_j))·(h_k − p) + α·g_{−k} ∘ p(1 − p)].

    Bias: none, for any α: c_k has the mean gradient α·g_{−k} ∘ p(1 − p), which is added again, and a c_j in the
    baseline has mean zero given all but h_j. (The source learns α; here it is a number.)
    Variance: zero for a loss linear in the gates at α = 1, that of the remainder otherwise. ∂L/∂h is taken at samples,
    by ``torch.func.grad``; L is never evaluated between 0 and 1.

    Cost: K evaluations, and K more with a gradient.

    Args:
        alpha: α; 0 is leave-one-out.

    Raises:
        ValueError: for an α that is not a finite number.

    >>> import torch
    >>> a = torch.zeros(1, 2, requires_grad=True)
    >>> noise = torch.tensor([[[0.4, 0.6]], [[0.7, 0.1]]])
    >>> value = DoubleControlVariates().surrogate(lambda h: h @ torch.tensor([2.0, 4.0]), a, noise)
    >>> value.sum().backward()
    >>> a.grad                                                        # linear: w·σ(a)(1 − σ(a)), at any noise
    tensor([[0.5000, 1.0000]])

    Reference: M. K. Titsias, J. Shi, "Double Control Variates for Gradient Estimation in Discrete Latent Variable
    Models", 2022, arXiv:2111.05300.
    """

    unbiased = True
    replicas = 2
    reference = "Titsias, Shi 2022, arXiv:2111.05300"

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = check_finite(alpha, "alpha")

    def estimate(
        self,
        objective: Objective,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *batch"],
        noise: Float[Tensor, "..."],
    ) -> Float[Tensor, "K *lead N"]:
        """Return the score of the remaining losses, and the expansion's own gradient."""
        slope = torch.func.grad(lambda h: evaluate(objective, h, self.event_dims).sum())(gates).to(wide(logits))
        exact = logits.to(wide(logits)).contiguous()
        p = exact.sigmoid()
        difference = gates.to(p.dtype) - p
        others = others_mean(slope)
        freed = losses.to(p.dtype) - self.alpha * (others * difference).sum(-1)
        signal = freed - others_mean(freed)
        return difference * signal.unsqueeze(-1) + self.alpha * others * p * (-exact).sigmoid()


def others_mean(values: Float[Tensor, "K *rest"]) -> Float[Tensor, "K *rest"]:
    """Return, for each replica, the mean over the other ones."""
    mean: Tensor = (values.sum(0) - values) / (len(values) - 1)
    return mean
