"""Finite differences of the loss in the logits: one unit at a time, in random signs, in Gaussian directions.

All three hold the gates' noise fixed while the logits move (common random numbers), so that a difference
contains only the gates that the perturbation switched. A smaller step has less bias and more variance: fewer gates
switch, and each switch counts 1/step.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_positive
from gatelet.estimators._base import Evaluating, Objective, evaluate
from gatelet.estimators._noise import GAUSSIAN, SIGN, wide


class _Perturbation(Evaluating):
    """Compares the losses of the gates of shifted logits, at the same noise."""

    unbiased = False

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "..."]) -> Float[Tensor, "*lead N"]:
        """Return the sample at the logits themselves; it carries no gradient."""
        return self.sample(logits, noise[..., 0] if self.more else noise)

    def estimate(
        self,
        objective: Objective,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *batch"],
        noise: Float[Tensor, "..."],
    ) -> Float[Tensor, "K *lead N"]:
        """Compare the losses at shifted logits with each other, or with those at the logits themselves."""
        exact = logits.to(wide(logits))
        uniform = noise[..., 0] if self.more else noise
        shifts = self.shifts(exact, noise)
        moved = torch.stack([self.sample(exact + shift, uniform) for shift in shifts]).to(logits.dtype)
        at = evaluate(objective, moved.flatten(0, 1), self.event_dims).unflatten(0, moved.shape[:2])
        return self.compare(at.to(exact.dtype), losses.to(exact.dtype), shifts)

    def shifts(self, logits: Float[Tensor, "K *lead N"], noise: Float[Tensor, "..."]) -> Float[Tensor, "M K *lead N"]:
        """Return the M shifts of the logits at which the objective is evaluated."""
        raise NotImplementedError

    def compare(
        self, moved: Float[Tensor, "M K *lead"], losses: Float[Tensor, "K *lead"], shifts: Float[Tensor, "M K *lead N"]
    ) -> Float[Tensor, "K *lead N"]:
        """Return each replica's estimate from the losses at the shifted logits and at the logits themselves."""
        raise NotImplementedError


class FiniteDifferences(_Perturbation):
    """Central difference of the loss in each logit, at common noise.

    ĝ_i = (1/K) Σ_k (L(h(a + c e_i; u_k)) − L(h(a − c e_i; u_k)))/(2c), h(a; u) = 1[u < σ(a)].

    Bias: O(c²): E[ĝ_i] = ∂E[L]/∂a_i · (σ(a_i + c) − σ(a_i − c)) / (2c σ(a_i)(1 − σ(a_i))); at a = 0 and
    c = 0.5 it is 2 % too small.
    Variance: about σ'(a_i)·E[ΔL_i²]/(2c) per unit, independent of N. Cost: 2N + 1 evaluations.

    Args:
        step: c, by which a logit is moved.

    >>> import torch
    >>> a = torch.zeros(1, 1, requires_grad=True)
    >>> FiniteDifferences(step=0.5).surrogate(lambda h: 3 * h.sum(-1), a, torch.tensor([[[0.6]]])).sum().backward()
    >>> a.grad                                                        # (3·1[0.6 < 0.62] − 3·1[0.6 < 0.38])/1
    tensor([[3.]])

    Reference: J. Kiefer, J. Wolfowitz, "Stochastic Estimation of the Maximum of a Regression Function", 1952.
    """

    reference = "Kiefer, Wolfowitz 1952"

    def __init__(self, step: float = 0.5) -> None:
        super().__init__()
        self.step = check_positive(step, "step")

    def shifts(self, logits: Float[Tensor, "K *lead N"], noise: Float[Tensor, "..."]) -> Float[Tensor, "M K *lead N"]:
        """Return +c in each unit, then −c in each unit."""
        units = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device) * self.step
        units = units.reshape(len(units), *(1,) * (logits.dim() - 1), len(units)).expand(-1, *logits.shape)
        return torch.cat([units, -units])

    def compare(
        self, moved: Float[Tensor, "M K *lead"], losses: Float[Tensor, "K *lead"], shifts: Float[Tensor, "M K *lead N"]
    ) -> Float[Tensor, "K *lead N"]:
        """Return (L₊ − L₋)/(2c), unit by unit."""
        up, down = moved.unflatten(0, (2, shifts.shape[-1])).movedim(1, -1)
        difference: Tensor = up - down
        return difference / (2 * self.step)


class SPSA(_Perturbation):
    """Central difference of the loss along one random direction of signs, for all units at once.

    ĝ_i = (1/K) Σ_k (L(h(a + cΔ_k; u_k)) − L(h(a − cΔ_k; u_k)))/(2cΔ_ki), Δ_ki = ±1, h(a; u) = 1[u < σ(a)].

    Bias: O(c²): E[ĝ_i] = 2^{−N} Σ_Δ (J(a + cΔ) − J(a − cΔ))/(2cΔ_i), with J(a) = E[L].
    Variance: of order N, every unit receives the effect of all; 1/c as for :class:`FiniteDifferences`.
    Cost: 3 evaluations, for any N (the loss itself, and two for the gradient).

    Args:
        step: c, by which the logits are moved.

    >>> import torch
    >>> a = torch.zeros(1, 1, requires_grad=True)
    >>> noise = torch.tensor([[[[0.6, -1.0]]]])                       # u and Δ
    >>> SPSA(step=0.5).surrogate(lambda h: 3 * h.sum(-1), a, noise).sum().backward()
    >>> a.grad                                                        # (0 − 3)/(2·0.5·−1)
    tensor([[3.]])

    Reference: J. C. Spall, "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient
    Approximation", 1992.
    """

    reference = "Spall 1992"
    more = (SIGN,)

    def __init__(self, step: float = 0.5) -> None:
        super().__init__()
        self.step = check_positive(step, "step")

    def shifts(self, logits: Float[Tensor, "K *lead N"], noise: Float[Tensor, "..."]) -> Float[Tensor, "M K *lead N"]:
        """Return cΔ and −cΔ."""
        step = noise[..., 1].to(logits.dtype) * self.step
        return torch.stack([step, -step])

    def compare(
        self, moved: Float[Tensor, "M K *lead"], losses: Float[Tensor, "K *lead"], shifts: Float[Tensor, "M K *lead N"]
    ) -> Float[Tensor, "K *lead N"]:
        """Return (L₊ − L₋)/(2cΔ)."""
        return (moved[0] - moved[1]).unsqueeze(-1) / (2 * shifts[0])


class FieteSeung(_Perturbation):
    """Correlates a Gaussian perturbation of the logits with the change of the loss.

    ĝ = (1/K) Σ_k (L(h(a + s z_k; u_k)) − L(h(a; u_k)))·z_k/s, z ~ N(0, 1), h(a; u) = 1[u < σ(a)].

    Bias: O(s²): E[ĝ] = E_z[∇J(a + s z)], the gradient of J(a) = E[L] smoothed by the perturbation.
    Variance: of order N/s; the unperturbed loss, at the same noise, is the baseline. Cost: 2 evaluations, for any N.

    Args:
        std: s, the perturbation's standard deviation.

    >>> import torch
    >>> a = torch.zeros(1, 1, requires_grad=True)
    >>> noise = torch.tensor([[[[0.6, 2.0]]]])                        # u and z
    >>> FieteSeung(std=0.5).surrogate(lambda h: 3 * h.sum(-1), a, noise).sum().backward()
    >>> a.grad                                                        # (3·1[0.6 < σ(1)] − 3·1[0.6 < ½])·2/0.5
    tensor([[12.]])

    Reference: I. R. Fiete, H. S. Seung, "Gradient Learning in Spiking Neural Networks by Dynamic Perturbation of
    Conductances", 2006.
    """

    reference = "Fiete, Seung 2006"
    more = (GAUSSIAN,)

    def __init__(self, std: float = 0.5) -> None:
        super().__init__()
        self.std = check_positive(std, "std")

    def shifts(self, logits: Float[Tensor, "K *lead N"], noise: Float[Tensor, "..."]) -> Float[Tensor, "M K *lead N"]:
        """Return s·z."""
        return (noise[..., 1].to(logits.dtype) * self.std).unsqueeze(0)

    def compare(
        self, moved: Float[Tensor, "M K *lead"], losses: Float[Tensor, "K *lead"], shifts: Float[Tensor, "M K *lead N"]
    ) -> Float[Tensor, "K *lead N"]:
        """Return (L(a + sz) − L(a))·z/s."""
        return (moved[0] - losses).unsqueeze(-1) * shifts[0] / self.std**2
