"""Continuous relaxations of binary and categorical units, and their straight-through form."""

from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import AnyKind, Estimator, straight_through
from gatelet.estimators._noise import LOGISTIC
from gatelet.estimators._temperature import keep, relax


class Concrete(Estimator):
    """Relaxed unit with values in (0, 1): plain back-propagation through a tempered sigmoid (Gumbel-softmax).

    h = σ((a + ℓ)/τ), ℓ standard logistic (Maddison et al., section 3.2; Jang et al., eq. 2). Categorical:
    h = softmax((a + g)/τ), g standard Gumbel.

    Bias: none for the relaxed unit's own expected loss; as an estimate for Bernoulli gates, E[ĝ] is the derivative of
    ∫ L(σ(y/τ)) f(y − a) dy (f: the logistic density), which tends to the exact gradient as τ → 0 where L is
    smooth on [0, 1], with an error of order τ (τ² for a linear loss).
    Variance: that of the path, which grows like 1/τ.
    A relaxed gate is never exactly 0: all units are computed. ``fire_probability`` is σ(a) = P(h > ½), the law of
    the hard gate that it stands for, and in deterministic mode gates are 0 and 1.

    Args:
        temperature: τ: a float, a scalar tensor (a buffer) or an ``nn.Parameter``, which then receives its gradient.
        kind: ``"bernoulli"``, ``"categorical"`` or ``"subset"``: k successive softmaxes of a + g, each without what
            the earlier ones took (S. M. Xie, S. Ermon, "Reparameterizable Subset Sampling via Continuous Relaxations",
            2019, arXiv:1901.10517). The hard gates are then the k largest a + g.
        k: for subset units, how many are open.

    Raises:
        ValueError: for a temperature that is not above 0.

    >>> import torch
    >>> Concrete(temperature=0.5)(torch.tensor([0.0, 1.0]), torch.tensor([0.5, -1.0]))
    tensor([0.7311, 0.5000])

    Reference: C. J. Maddison, A. Mnih, Y. W. Teh, "The Concrete Distribution: A Continuous Relaxation of Discrete
    Random Variables", 2017, arXiv:1611.00712; E. Jang, S. Gu, B. Poole, "Categorical Reparameterization with
    Gumbel-Softmax", 2017, arXiv:1611.01144.
    """

    unbiased = False
    needs = "path"
    support = "all"
    binary = False
    law = LOGISTIC
    kinds = ("bernoulli", "categorical", "subset")
    reference = "Maddison, Mnih, Teh 2017, arXiv:1611.00712; Jang, Gu, Poole 2017, arXiv:1611.01144"
    temperature: float | Tensor

    def __init__(self, temperature: float | Tensor = 0.5, kind: AnyKind = "bernoulli", k: int | None = None) -> None:
        super().__init__(kind, k)
        keep(self, temperature)

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return σ((a + ℓ)/τ) or softmax((a + g)/τ)."""
        return relax(logits.to(noise.dtype) + noise, self.temperature, self.form).to(logits.dtype)


class StraightThroughGumbel(Concrete):
    """Hard unit whose backward pass is that of the relaxation at the same noise (ST Gumbel-softmax).

    h = 1[a + ℓ > 0], ℓ standard logistic; ∂L/∂a ≈ ∂L/∂h · σ′((a + ℓ)/τ)/τ (Jang et al., section 2.2). Categorical:
    h = one-hot argmax(a + g), backward through softmax((a + g)/τ).

    Bias: E[ĝ_i] = Σ_h P(h)·∂L/∂h_i(h)·E[σ′((a_i + ℓ)/τ)/τ | h_i]. As τ → 0 that tends to
    p(1 − p)·½(E[∂L/∂h_i | h_i = 1] + E[∂L/∂h_i | h_i = 0]): the trapezoid rule, exact for quadratic losses only.
    Variance: grows like 1/τ; :class:`~gatelet.estimators.gumbel_rao.GumbelRao` reduces it at the same expectation.

    Args:
        temperature: τ: a float, a scalar tensor (a buffer) or an ``nn.Parameter``, which receives the derivative of the
            relaxed path.
        kind: ``"bernoulli"``, ``"categorical"`` or ``"subset"``: k successive softmaxes of a + g, each without what
            the earlier ones took (S. M. Xie, S. Ermon, "Reparameterizable Subset Sampling via Continuous Relaxations",
            2019, arXiv:1901.10517). The hard gates are then the k largest a + g.
        k: for subset units, how many are open.

    Raises:
        ValueError: for a temperature that is not above 0.

    >>> import torch
    >>> a = torch.tensor([0.0, 1.0], requires_grad=True)
    >>> h = StraightThroughGumbel(temperature=0.5)(a, torch.tensor([0.5, -2.0]))
    >>> h
    tensor([1., 0.], grad_fn=<AddBackward0>)
    >>> torch.autograd.grad(h.sum(), a)[0]                             # σ′(1)/τ, σ′(−2)/τ
    tensor([0.3932, 0.2100])

    Reference: E. Jang, S. Gu, B. Poole, "Categorical Reparameterization with Gumbel-Softmax", 2017,
    arXiv:1611.01144, section 2.2.
    """

    binary = True
    reference = "Jang, Gu, Poole 2017, arXiv:1611.01144, section 2.2"

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return 1[a + ℓ > 0] or one-hot argmax(a + g), with the derivative of the relaxation."""
        z = logits.to(noise.dtype) + noise
        return straight_through(self.form.harden(z), relax(z, self.temperature, self.form)).to(logits.dtype)
