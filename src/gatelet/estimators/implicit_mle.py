"""Perturb-and-MAP with finite differences of the gates in the direction of the loss's gradient: I-MLE, and AIMLE."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_positive, check_rate, is_transformed
from gatelet.estimators._base import AnyKind, Estimator
from gatelet.estimators._distributed import batch_mean
from gatelet.estimators._noise import LOGISTIC


class IMLE(Estimator):
    """Perturbed gates, whose gradient is how they change when the logits step against the loss's gradient.

    h = MAP(a + z); ĝ = (h − MAP(a − λ·∂L/∂h + z))/λ, at the same noise z. MAP of Bernoulli units is 1[· > 0], z
    logistic; of k of N it is the k largest, z Gumbel.
    (The source allows any perturbation and proposes a sum of Gammas; Gumbel is taken here, for which k = 1 samples the
    softmax. Its code leaves out the factor 1/λ by default; it is kept, so that λ is no step size.)

    Bias: for Bernoulli units, g = ∂L/∂h at h, E[ĝ_i] = Σ_h P(h)·(σ(a_i) − σ(a_i − λg_i))/λ / P(h_i), where h_i = 1 and
    g_i > 0 or h_i = 0 and g_i < 0, and 0 otherwise: a gate that is closed never learns that it should not open.
    Variance: of order 1/λ; most estimates are 0.
    Scale of the loss: what counts is λ·∂L/∂h, with ∂L/∂h as it arrives. For the loss s·L the estimate is s times that
    for L with the step s·λ: under a mean over B examples (s = 1/B) the step of an example's own loss is λ/B, and it
    takes step = B to have the 1 of the source. (:class:`AIMLE` does not depend on it.)

    Args:
        step: λ, in the logits' unit per unit of the loss's slope.
        kind: ``"bernoulli"`` or ``"subset"``.
        k: for subset units, how many are open.

    Raises:
        ValueError: for a step that is not above 0.

    >>> import torch
    >>> a = torch.tensor([0.5, 0.5], requires_grad=True)
    >>> h = IMLE(step=1.0)(a, torch.zeros(2))
    >>> torch.autograd.grad((h * torch.tensor([3.0, 0.2])).sum(), a)[0]           # 0.5 − 3 closes the first unit
    tensor([1., 0.])

    Reference: M. Niepert, P. Minervini, L. Franceschi, "Implicit MLE: Backpropagating Through Discrete Exponential
    Family Distributions", 2021, arXiv:2106.01798.
    """

    unbiased = False
    needs = "path"
    law = LOGISTIC
    kinds = ("bernoulli", "subset")
    reference = "Niepert, Minervini, Franceschi 2021, arXiv:2106.01798"

    def __init__(self, step: float = 1.0, kind: AnyKind = "bernoulli", k: int | None = None) -> None:
        super().__init__(kind, k)
        self.step = check_positive(step, "step")

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return MAP(a + z), with the finite difference behind it."""
        gates: Tensor = _Difference.apply(logits.to(noise.dtype), noise, self)
        return gates.to(logits.dtype)

    def difference(
        self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"], slope: Float[Tensor, "*lead N"]
    ) -> Float[Tensor, "*lead N"]:
        """Return the estimate, for ∂L/∂h = ``slope``."""
        z = logits + noise
        return (self.form.harden(z) - self.form.harden(z - self.step * slope)) / self.step


class AIMLE(IMLE):
    """I-MLE with a central difference whose step is adapted until about one gate of an example changes.

    ĝ = (MAP(a + λg + z) − MAP(a − λg + z))/(2λ), g = ∂L/∂h, λ = β·|a|/|g|, the norms over an example's units. After
    every backward pass β grows by ``rate`` if a moving average of the number of gates that changed (per example) is
    below 1, and shrinks by it otherwise. (The source's code takes the norms over the batch, which would let an
    example's estimate depend on the others, and divides by λ; its eq. for the central difference has 2λ.)

    Bias: for Bernoulli units at a given β, E[ĝ_i] = Σ_h P(h)·sign(g_i)·d_i(h_i)/(2λ P(h_i)), with d_i(1) =
    σ(a_i) − σ(a_i − λ|g_i|) and d_i(0) = σ(a_i + λ|g_i|) − σ(a_i): as λ → 0, the trapezoid rule, exact for losses
    quadratic in each gate. Variance: of order 1/λ.

    Args:
        beta: β at the start.
        rate: what β moves by.
        decay: of the moving average.
        kind: ``"bernoulli"`` or ``"subset"``.
        k: for subset units, how many are open.

    Raises:
        ValueError: for a β or a rate that is not above 0, or a decay outside (0, 1).

    >>> import torch
    >>> a = torch.tensor([0.5, 0.5], requires_grad=True)
    >>> h = AIMLE(beta=1.0)(a, torch.zeros(2))
    >>> torch.autograd.grad((h * torch.tensor([3.0, 0.2])).sum(), a)[0].round(decimals=3)      # λ = |a|/|g| = 0.235
    tensor([2.1260, 0.0000])

    Reference: P. Minervini, L. Franceschi, M. Niepert, "Adaptive Perturbation-Based Gradient Estimation for Discrete
    Latent Variable Models", 2023, arXiv:2209.04862.
    """

    reference = "Minervini, Franceschi, Niepert 2023, arXiv:2209.04862"
    scale: Tensor
    changed: Tensor

    def __init__(
        self,
        beta: float = 1.0,
        rate: float = 1e-4,
        decay: float = 0.9,
        kind: AnyKind = "bernoulli",
        k: int | None = None,
    ) -> None:
        super().__init__(kind=kind, k=k)
        self.beta, self.rate = check_positive(beta, "beta"), check_positive(rate, "rate")
        self.decay = check_rate(decay, "decay")
        self.register_buffer("scale", torch.tensor(self.beta))
        self.register_buffer("changed", torch.tensor(1.0))

    def difference(
        self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"], slope: Float[Tensor, "*lead N"]
    ) -> Float[Tensor, "*lead N"]:
        """Return the estimate, for ∂L/∂h = ``slope``, and adapt β."""
        tiny = torch.finfo(slope.dtype).tiny
        logits, slope = logits.contiguous(), slope.contiguous()
        length = slope.norm(dim=-1, keepdim=True)
        step = self.scale.to(slope.dtype) * logits.norm(dim=-1, keepdim=True) / length.clamp_min(tiny)
        z = logits + noise
        moved = self.form.harden(z + step * slope) - self.form.harden(z - step * slope)
        if not torch.compiler.is_compiling() and not is_transformed(moved):
            self._adapt(moved.ne(0).sum(-1, keepdim=True).to(self.changed.dtype))
        return torch.where(step > 0, moved / (2 * step).clamp_min(tiny), 0.0)

    def _adapt(self, changes: Float[Tensor, "*lead 1"]) -> None:
        """Take the number of gates that changed, over the examples of all processes, into β."""
        seen = batch_mean(changes)
        if seen is not None:
            self.changed.lerp_(seen.squeeze(0).to(self.changed), 1 - self.decay)
            self.scale.add_(torch.where(self.changed < 1, self.rate, -self.rate)).clamp_min_(0.0)


class _Difference(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, noise: Tensor, method: IMLE) -> Tensor:
        return method.form.harden(logits + noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, IMLE], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.method = inputs[2]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return ctx.method.difference(*ctx.saved_tensors, slope), None, None
