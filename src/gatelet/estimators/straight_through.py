"""Section 4: the straight-through estimator."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_choice
from gatelet.estimators._base import AnyKind, Estimator, straight_through
from gatelet.estimators._noise import NONE


class StraightThrough(Estimator):
    """Binary unit whose backward pass treats it as the identity (or the sigmoid).

    h ~ Bernoulli(σ(a)), or h = 1[a > 0] on a hard unit; ∂L/∂a ≈ ∂L/∂h, or ∂L/∂h · σ(a)(1 − σ(a)) (section 4).

    Bias: E[ĝ_i] = E_h[∂L/∂h_i] · slope(a_i), with ∂L/∂h taken at the sample. With the sigmoid slope that is exact for a
    loss linear in h_i. With the identity slope it has the right sign for a single layer of one unit and a monotone
    loss, but not in general with more layers.
    Variance: that of ∂L/∂h; the lowest of the paper's estimators. Every gate, closed ones too, needs ∂L/∂h.

    Args:
        slope: ``"identity"`` (the paper found it better) or ``"sigmoid"``.
        unit: ``"sampled"`` or ``"hard"``, which ignores the noise.
        kind: ``"bernoulli"``, or ``"categorical"``: h one-hot, the sigmoid replaced by the softmax; or ``"subset"``:
            k ones, the sigmoid replaced by the marginals P(h_i = 1), which is SIMPLE's gradient.
        k: for subset units, how many are open.

    >>> import torch
    >>> a = torch.tensor([0.0, 0.0], requires_grad=True)
    >>> h = StraightThrough()(a, torch.tensor([0.4, 0.6]))
    >>> h
    tensor([1., 0.], grad_fn=<AddBackward0>)
    >>> torch.autograd.grad((h * torch.tensor([3.0, 5.0])).sum(), a)[0]
    tensor([3., 5.])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 4; the idea: G. Hinton, "Neural
    Networks for Machine Learning", lecture 15b, 2012.
    """

    unbiased = False
    needs = "path"
    support = "all"
    reference = "Bengio, Léonard, Courville 2013, arXiv:1308.3432, section 4; Hinton 2012, lecture 15b"
    kinds = ("bernoulli", "categorical", "subset")

    def __init__(
        self,
        slope: Literal["identity", "sigmoid"] = "identity",
        unit: Literal["sampled", "hard"] = "sampled",
        kind: AnyKind = "bernoulli",
        k: int | None = None,
    ) -> None:
        super().__init__(kind, k)
        self.slope = check_choice(slope, ("identity", "sigmoid"), "slope")
        self.unit = check_choice(unit, ("sampled", "hard"), "unit")
        if self.unit == "hard":
            self.law = NONE

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the sample (or the hard threshold) with the chosen slope behind it."""
        path = logits if self.slope == "identity" else self.probability(logits)
        return straight_through(self.threshold(logits) if self.unit == "hard" else self.sample(logits, noise), path)

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return σ(a) or softmax(a); on a hard unit 1[a > 0], with their derivative so that a rate can be held."""
        probability = self.probability(logits)
        return probability if self.unit == "sampled" else straight_through(self.threshold(logits), probability)

    def logit_at(self, probability: float) -> float:
        """Return the logit of the probability; on a hard unit 0, where it opens."""
        return super().logit_at(probability) if self.unit == "sampled" else 0.0


class ClippedStraightThrough(StraightThrough):
    """Straight-through without gradient where the logit is outside [−1, 1]: the derivative of the hard tanh.

    h ~ Bernoulli(σ(a)), or h = 1[a > 0] on a hard unit; ∂L/∂a ≈ ∂L/∂h · 1[|a| ≤ 1] (Hubara et al., eq. 4).

    Bias: E[ĝ_i] = E_h[∂L/∂h_i]·1[|a_i| ≤ 1], with ∂L/∂h taken at the sample: that of straight-through inside, and no
    gradient outside, so that logits do not run away. A unit outside stays there unless its input moves.
    Variance: that of ∂L/∂h inside, 0 outside.

    Args:
        unit: ``"sampled"`` or ``"hard"``, which ignores the noise (the binarised networks of the source).

    >>> import torch
    >>> a = torch.tensor([0.5, 2.0], requires_grad=True)
    >>> h = ClippedStraightThrough(unit="hard")(a, torch.zeros(2))
    >>> torch.autograd.grad((h * torch.tensor([3.0, 5.0])).sum(), a)[0]
    tensor([3., 0.])

    Reference: I. Hubara, M. Courbariaux, D. Soudry, R. El-Yaniv, Y. Bengio, "Binarized Neural Networks", 2016,
    arXiv:1602.02830, section 1.3.
    """

    reference = "Hubara, Courbariaux, Soudry, El-Yaniv, Bengio 2016, arXiv:1602.02830"
    kinds = ("bernoulli",)  # type: ignore[assignment]  # mypy takes the base's value for its type

    def __init__(self, unit: Literal["sampled", "hard"] = "sampled") -> None:
        super().__init__(unit=unit)

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the sample (or the hard threshold) with the derivative of the hard tanh, clamp(a, −1, 1)."""
        gates = self.threshold(logits) if self.unit == "hard" else self.sample(logits, noise)
        return straight_through(gates, torch.nn.functional.hardtanh(logits))
