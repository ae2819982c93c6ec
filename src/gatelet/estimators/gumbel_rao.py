"""Straight-through Gumbel with part of its noise averaged out."""

from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_count
from gatelet.estimators._base import AnyKind, Estimator, straight_through
from gatelet.estimators._noise import LOGISTIC
from gatelet.estimators._temperature import keep, relax


class GumbelRao(Estimator):
    """Straight-through Gumbel whose backward pass is averaged over S noises that give the same gates.

    h ~ Bernoulli(σ(a)); ∂L/∂a ≈ ∂L/∂h · (1/S) Σ_s σ′(z_s/τ)/τ, z_s drawn from the law of a + ℓ given h (eq. 13).
    Categorical: the mean Jacobian of softmax(z_s/τ), z_s drawn from the law of a + g given h.
    The derivative is taken at fixed noise, ∂z_s/∂a = 1, as in straight-through Gumbel; taken through the
    conditional draw it would have another expectation.

    Bias: that of :class:`~gatelet.estimators.concrete.StraightThroughGumbel`, whose expectation it has for every S:
    E[ĝ_i] = Σ_h P(h)·∂L/∂h_i(h)·E[σ′(z_i/τ)/τ | h_i].
    Variance: at most that of straight-through Gumbel (equal for S = 1), less E[Var(ĝ | h)]·(1 − 1/S). The loss
    is evaluated once; the noise and the relaxation cost S times the memory.

    Args:
        inner: S, the number of conditional draws.
        temperature: τ: a float, a scalar tensor (a buffer) or an ``nn.Parameter``, which receives the derivative of the
            relaxed path.
        kind: ``"bernoulli"`` or ``"categorical"``.

    Raises:
        ValueError: for a temperature that is not above 0, or fewer than one draw.

    >>> import torch
    >>> a = torch.tensor([0.0], requires_grad=True)
    >>> h = GumbelRao(inner=2)(a, torch.tensor([[0.3, 1.0, -1.0]]))     # a uniform number, two logistic ones
    >>> h
    tensor([1.], grad_fn=<AddBackward0>)
    >>> torch.autograd.grad(h.sum(), a)[0]
    tensor([0.2101])

    Reference: M. B. Paulus, C. J. Maddison, A. Krause, "Rao-Blackwellizing the Straight-Through Gumbel-Softmax
    Gradient Estimator", 2021, arXiv:2010.04838.
    """

    unbiased = False
    needs = "path"
    support = "all"
    kinds = ("bernoulli", "categorical")
    reference = "Paulus, Maddison, Krause 2021, arXiv:2010.04838"
    temperature: float | Tensor

    def __init__(self, inner: int = 10, temperature: float | Tensor = 0.5, kind: AnyKind = "bernoulli") -> None:
        super().__init__(kind)
        self.inner = check_count(inner, "inner")
        self.more = (self.form.noise(LOGISTIC),) * inner
        keep(self, temperature)

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N S"]) -> Float[Tensor, "*lead N"]:
        """Return the sample, with the mean derivative of the relaxations that agree with it."""
        wide = logits.to(noise.dtype).contiguous()
        drawn = noise.movedim(-1, 0).contiguous()
        gates = self.sample(wide, drawn[0])
        z = self.form.condition(wide.detach(), gates, drawn[1:])
        path = relax(straight_through(z, wide.expand_as(z)), self.temperature, self.form).mean(0)
        return straight_through(gates, path).to(logits.dtype)
