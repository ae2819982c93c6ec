"""Straight-through whose forward and backward pass have temperatures of their own."""

from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_positive
from gatelet.estimators._base import AnyKind, Estimator, straight_through


class DecoupledStraightThrough(Estimator):
    """Straight-through with one temperature for the sampling and another for the derivative.

    h ~ Bernoulli(σ(a/τ_f)); ∂L/∂a ≈ ∂L/∂h·σ′(a/τ_b)/τ_b. Categorical: h ~ softmax(a/τ_f), backward through
    softmax(a/τ_b). (The noise is in the forward pass alone, as in the paper's second version; its first one
    relaxed a + g in the backward pass.)

    Bias: E[ĝ_i] = E_h[∂L/∂h_i]·σ′(a_i/τ_b)/τ_b, the expectation over h ~ σ(a/τ_f); exact for a linear loss where both
    temperatures are equal.
    Variance: that of ∂L/∂h times the slope; a small τ_f makes the gates nearly deterministic.

    Args:
        forward_temperature: τ_f, above 1 for more exploration.
        backward_temperature: τ_b, above 1 for gradients to units that are nearly decided.
        kind: ``"bernoulli"`` or ``"categorical"``.

    Raises:
        ValueError: for a temperature that is not above 0.

    >>> import torch
    >>> a = torch.tensor([1.0], requires_grad=True)
    >>> h = DecoupledStraightThrough(0.5, 2.0)(a, torch.tensor([0.8]))            # σ(2) = 0.88
    >>> h.item(), torch.autograd.grad(h.sum(), a)[0]                              # σ′(½)/2
    (1.0, tensor([0.1175]))

    Reference: R. Shah, M. Yan, M. C. Mozer, D. Liu, "Improving Discrete Optimisation Via Decoupled Straight-Through
    Estimator", 2024, arXiv:2410.13331.
    """

    unbiased = False
    needs = "path"
    kinds = ("bernoulli", "categorical")
    reference = "Shah, Yan, Mozer, Liu 2024, arXiv:2410.13331"

    def __init__(
        self, forward_temperature: float = 1.0, backward_temperature: float = 2.0, kind: AnyKind = "bernoulli"
    ) -> None:
        super().__init__(kind)
        self.forward_temperature = check_positive(forward_temperature, "forward_temperature")
        self.backward_temperature = check_positive(backward_temperature, "backward_temperature")

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the sample at τ_f, with the derivative at τ_b."""
        a = logits.to(noise.dtype).contiguous()
        gates = self.sample(a / self.forward_temperature, noise)
        return straight_through(gates, self.probability(a / self.backward_temperature)).to(logits.dtype)

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return σ(a/τ_f), or softmax(a/τ_f)."""
        return self.probability(logits / self.forward_temperature)

    def logit_at(self, probability: float) -> float:
        """Return τ_f times the logit of the probability."""
        return self.forward_temperature * super().logit_at(probability)
