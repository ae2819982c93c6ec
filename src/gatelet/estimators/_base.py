"""The contract of an estimator, and the only machinery that estimators share.

An estimator says two things: which gates a unit sends up (:meth:`Estimator.forward`) and which gradient comes
down to the logits. By what it ``needs`` for the second there are three kinds:

``"path"``
    The gates are differentiable (with whatever derivative the estimator declares); plain back-propagation
    does the rest.
``"loss"``
    The gates carry no gradient. The estimate is :meth:`Estimator.coefficients`, a function of logits, gates
    and each example's loss.
``"objective"``
    The estimate evaluates the objective at several gates; :meth:`Estimator.surrogate` is overridden.

The noise is always an argument, so that a test can replace drawing by enumeration.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Objective = Callable[[Tensor], Tensor]
"""Maps gates (K, B, N) to a loss per replica and example (K, B)."""

Law = Literal["none", "uniform", "gaussian", "logistic"]
Support = Literal["none", "open", "all"]


class Estimator(nn.Module):
    """How a gradient crosses a discrete, stochastic or hard unit. Subclasses are the methods.

    Class attributes: ``unbiased`` (the expected gradient is the gradient of the expected loss), ``needs``
    (``"path"``, ``"loss"`` or ``"objective"``, see the module), ``support`` (which gates ask for ∂L/∂h:
    ``"none"``, the ``"open"`` ones, ``"all"``; a closed gate outside of it may be skipped in training),
    ``law`` (the distribution of the noise), ``reference`` (the source), ``variants`` (option sets that are
    certified beside the defaults).
    """

    unbiased: ClassVar[bool]
    needs: ClassVar[Literal["path", "loss", "objective"]]
    reference: ClassVar[str]
    support: ClassVar[Support] = "all"
    variants: ClassVar[Sequence[Mapping[str, Any]]] = ()
    binary: ClassVar[bool] = True
    """Whether the gates are 0 or 1, so that the expected loss is a sum over 2^N outcomes."""
    piecewise_constant: ClassVar[bool] = True
    """Whether gates and gradient are constant in the noise between its breaks (they are smooth there otherwise)."""
    law: Law = "uniform"

    # ---------------------------------------------------------------- what an estimator defines

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the gates for this noise; differentiable in the logits iff ``needs == "path"``."""
        raise NotImplementedError

    def coefficients(
        self,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *lead"],
    ) -> Float[Tensor, "K *lead N"]:
        """Return each replica's estimate of ∂E[L]/∂logits from its loss (estimators that need the loss)."""
        raise NotImplementedError(f"{type(self).__name__} has no coefficients: it needs the {self.needs}")

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return P(h ≠ 0), differentiable in the logits."""
        return logits.sigmoid()

    def logit_at(self, probability: float) -> float:
        """Return the logit at which a gate fires with this probability (inverse of ``fire_probability``)."""
        return math.log(probability) - math.log1p(-probability)

    def open_value(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the value of an open gate in deterministic mode."""
        return torch.ones_like(logits)

    def breaks(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N J"]:
        """Return the noise values at which a unit's gate jumps or has a kink; between them it is smooth."""
        return logits.sigmoid().unsqueeze(-1)

    # ---------------------------------------------------------------- what all estimators share

    def draw_noise(
        self, logits: Float[Tensor, "*lead N"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*lead N"]:
        """Draw the unit's noise for these logits, from ``generator`` or torch's global one.

        Half-precision logits get float32 noise: a uniform number in bfloat16 has 8 bits, which would make
        a unit at p = 0.1 fire visibly too often or too seldom.
        """
        shape, device = logits.shape, logits.device
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if self.law == "none":
            return logits.new_zeros(()).expand(shape)
        if self.law == "gaussian":
            return torch.randn(shape, dtype=dtype, device=device, generator=generator)
        uniform = torch.rand(shape, dtype=dtype, device=device, generator=generator)
        return uniform if self.law == "uniform" else uniform.logit(eps=torch.finfo(dtype).tiny)

    def deterministic(self, logits: Float[Tensor, "*lead N"], threshold: Float[Tensor, ""]) -> Float[Tensor, "*lead N"]:
        """Return the test-time gates: open, at :meth:`open_value`, iff the logit exceeds ``threshold``.

        The firing probability of every unit grows with its logit, so this is the paper's rule (A.3) with
        the threshold expressed as a logit, where saturated probabilities can still be told apart.
        """
        return torch.where(logits > threshold, self.open_value(logits), torch.zeros_like(logits))

    def surrogate(
        self,
        objective: Objective,
        logits: Float[Tensor, "*lead N"],
        noise: Float[Tensor, "K *lead N"],
    ) -> Float[Tensor, "*lead"]:
        """Return the mean loss over the replicas, with this estimator's gradient for the logits."""
        replicas = logits.expand(noise.shape)
        gates = self(replicas, noise)
        losses = evaluate(objective, gates)
        if self.needs == "path":
            return losses.mean(0)
        return (losses + self.signal(replicas, gates, losses)).mean(0)

    def signal(
        self,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *rest"],
    ) -> Float[Tensor, "K *rest"]:
        """Return a zero whose gradient to the logits is :meth:`coefficients`.

        ``losses`` may lack trailing dimensions of ``logits.shape[:-1]``: units that act several times for
        one loss (the tokens of a sequence, the steps of an episode) all receive that loss (Theorem 1).
        """
        with torch.no_grad():
            full = losses.reshape(losses.shape + (1,) * (logits.dim() - 1 - losses.dim()))
            value = self.coefficients(logits, gates, full.expand(logits.shape[:-1]).to(wide(logits)))
        # The product is formed in the logits' own dtype: a coefficient is a gradient of theirs.
        inner = (value.to(logits.dtype) * logits).flatten(losses.dim()).sum(-1)
        return (inner - inner.detach()).to(losses.dtype)


def evaluate(objective: Objective, gates: Float[Tensor, "K *lead N"]) -> Float[Tensor, "K *lead"]:
    """Call the objective and check the shape of what it returns."""
    losses = objective(gates)
    expected = gates.shape[:-1]
    if not isinstance(losses, Tensor) or losses.shape != expected:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"objective must map gates {tuple(gates.shape)} to one loss per replica and example, shape "
            f"{tuple(expected)}, but returned {found}; reduce over the units only"
        )
    return losses


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which probabilities and noise are compared: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def bernoulli(probability: Float[Tensor, "*s"], noise: Float[Tensor, "*s"]) -> Bool[Tensor, "*s"]:
    """Return 1[u < p], true with probability p (the paper's eq. 3 prints >, which gives 1 − p)."""
    return noise < probability


def straight_through(value: Float[Tensor, "*s"], path: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Return ``value`` with the derivative of ``path``.

    Written as algebra, not as an autograd.Function: so torch.compile, torch.func and double backward see
    through it. ``path − path`` is an exact zero for finite numbers, so the value keeps its bits.
    """
    return value.detach() + (path - path.detach())
