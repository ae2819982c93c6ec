"""DARN, and its average with straight-through: the zero-temperature limit of the Rao-Blackwellised ST Gumbel (ZGR)."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import AnyKind, Estimator, straight_through


class DARN(Estimator):
    """Score function whose learning signal is L(h) − L(mean gates), expanded to first order at the sample.

    h ~ Bernoulli(p), p = σ(a); ∂L/∂a ≈ ∂L/∂h·(h − p)². Categorical: (h − p)·(∂L/∂h·(h − p)), p = softmax(a). Each
    variable uses only its own part of the expansion; what that leaves out has mean zero where ∂L/∂h is constant.

    Bias: E[ĝ_i] = Σ_h P(h)·∂L/∂h_i(h)·(h_i − p_i)²: exact for a loss linear in each gate; for h_i² it is
    2·p(1 − p)² against the exact p(1 − p).
    Variance: that of ∂L/∂h times the factor; the gates are the only noise.

    Args:
        kind: ``"bernoulli"`` or ``"categorical"``.

    >>> import torch
    >>> a = torch.tensor([0.0, 0.0], requires_grad=True)
    >>> h = DARN()(a, torch.tensor([0.4, 0.6]))
    >>> torch.autograd.grad((h * torch.tensor([2.0, 4.0])).sum(), a)[0]            # ¼ of the slopes
    tensor([0.5000, 1.0000])

    Reference: K. Gregor, I. Danihelka, A. Mnih, C. Blundell, D. Wierstra, "Deep AutoRegressive Networks", 2014,
    arXiv:1310.8499; the form for classes: A. Shekhovtsov, "Cold Analysis of Rao-Blackwellized Straight-Through
    Gumbel-Softmax Gradient Estimator", 2023.
    """

    unbiased = False
    needs = "path"
    kinds = ("bernoulli", "categorical")
    reference = "Gregor, Danihelka, Mnih, Blundell, Wierstra 2014, arXiv:1310.8499; Shekhovtsov 2023"

    def __init__(self, kind: AnyKind = "bernoulli") -> None:
        super().__init__(kind)

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the sample, with DARN's derivative behind it."""
        a = logits.to(noise.dtype).contiguous()
        with torch.no_grad():
            p = self.probability(a)
            gates = self.form.sample(a, noise, p)
        return straight_through(gates, self.path(a, gates, p)).to(logits.dtype)

    def path(self, a: Tensor, gates: Tensor, p: Tensor) -> Tensor:
        """Return a function linear in the logits a that has the estimator's derivative."""
        return self.form.linear(a, outers=((1.0, gates - p),))


class ZGR(DARN):
    """Average of straight-through and DARN: exact for losses that are quadratic in the gates of a variable.

    h ~ Bernoulli(p), p = σ(a); ∂L/∂a ≈ ∂L/∂h·½(p(1 − p) + (h − p)²) = ∂L/∂h·½|h − p|. Categorical, x the open class,
    g = ∂L/∂h: ½·p_c·(g_c − g_x) for c ≠ x, ½·(g_x − p·g) for c = x. Both are ReinMax at temperature 1.

    Bias: E[ĝ_c] = Σ_c' p_c p_c'·½(g(c) + g(c'))·(e_c − e_c'), g(c) the gradient at class c: the trapezoid rule for
    every difference L(c) − L(c'), exact for quadratic losses, of third order in general.
    Variance: that of ∂L/∂h times the factor; the gates are the only noise, and there is no temperature.

    Args:
        kind: ``"bernoulli"`` or ``"categorical"``.

    >>> import torch
    >>> a = torch.tensor([0.0, 0.0], requires_grad=True)
    >>> h = ZGR()(a, torch.tensor([0.4, 0.6]))
    >>> torch.autograd.grad(h.sum(), a)[0]
    tensor([0.2500, 0.2500])

    Reference: A. Shekhovtsov, "Cold Analysis of Rao-Blackwellized Straight-Through Gumbel-Softmax Gradient Estimator",
    2023, International Conference on Machine Learning.
    """

    reference = "Shekhovtsov 2023"

    def path(self, a: Tensor, gates: Tensor, p: Tensor) -> Tensor:
        """Return half of both paths."""
        return self.form.second_order(a, gates, p)
