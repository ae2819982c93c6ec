"""Straight-through with a deterministic gap between the open class and the others."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_positive
from gatelet.estimators._base import AnyKind, Estimator, straight_through
from gatelet.estimators._temperature import keep, relax


class GappedStraightThrough(Estimator):
    """Straight-through Gumbel whose noise, in the backward pass, is a deterministic function of the gates (GST).

    h ~ Categorical(softmax(a)), one-hot; the backward pass is that of softmax((a + m₁ + m₂)/τ), with constants
    m₁ = h ⊙ (max a − a), which lifts the open class to the top, and m₂ = −(1 − h) ⊙ max(0, a + gap − max a), which
    holds the others at least ``gap`` below it (section 4). Bernoulli, as two classes with logits (a, 0):
    σ(e/τ) with e = max(a, gap) where h = 1 and e = min(a, −gap) where h = 0.

    Bias: E[ĝ_i] = Σ_h P(h)·∂L/∂h_i(h)·σ′(e_i(h_i)/τ)/τ. As τ → 0 it tends to 0, the gap keeps every e away from 0;
    the temperature is a step size too.
    Variance: that of ∂L/∂h times the slope; no noise but that of the gates.

    Args:
        gap: the least distance between the open class and the others.
        temperature: τ: a float, a scalar tensor (a buffer) or an ``nn.Parameter``, which receives the derivative of the
            relaxed path.
        kind: ``"bernoulli"`` or ``"categorical"``.

    Raises:
        ValueError: for a temperature or a gap that is not above 0.

    >>> import torch
    >>> a = torch.tensor([0.5, 2.0], requires_grad=True)
    >>> h = GappedStraightThrough()(a, torch.tensor([0.1, 0.1]))
    >>> h
    tensor([1., 1.], grad_fn=<AddBackward0>)
    >>> torch.autograd.grad(h.sum(), a)[0]                             # σ′(1), σ′(2)
    tensor([0.1966, 0.1050])

    Reference: T.-H. Fan, T.-C. Chi, A. I. Rudnicky, P. J. Ramadge, "Training Discrete Deep Generative Models via
    Gapped Straight-Through Estimator", 2022, arXiv:2206.07235.
    """

    unbiased = False
    needs = "path"
    support = "all"
    kinds = ("bernoulli", "categorical")
    reference = "Fan, Chi, Rudnicky, Ramadge 2022, arXiv:2206.07235"
    temperature: float | Tensor

    def __init__(self, gap: float = 1.0, temperature: float | Tensor = 1.0, kind: AnyKind = "bernoulli") -> None:
        super().__init__(kind)
        self.gap = check_positive(gap, "gap")
        keep(self, temperature)

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the sample, with the derivative of the relaxation at the gapped logits."""
        wide = logits.to(noise.dtype).contiguous()
        gates = self.sample(wide, noise)
        gapped = _GAPPED[self.form.name](wide.detach(), gates, self.gap)
        path = relax(straight_through(gapped, wide), self.temperature, self.form)
        return straight_through(gates, path).to(logits.dtype)


def _gapped_gate(logits: Tensor, gates: Tensor, gap: float) -> Tensor:
    return torch.where(gates > 0, logits.clamp_min(gap), logits.clamp_max(-gap))


def _gapped_classes(logits: Tensor, gates: Tensor, gap: float) -> Tensor:
    top = logits.amax(-1, keepdim=True)
    return torch.where(gates > 0, top, torch.minimum(logits, top - gap))


# By kind, a + m₁ + m₂.
_GAPPED = {"bernoulli": _gapped_gate, "categorical": _gapped_classes}
