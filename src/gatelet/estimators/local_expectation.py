"""Each unit's effect on the loss, computed exactly while the other units keep their sample."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import Evaluating, Objective, evaluate
from gatelet.estimators._noise import wide


class LocalExpectation(Evaluating):
    """Each unit's exact marginal difference, given the drawn gates of the others (also: RAM; measure-valued).

    ĝ_i = (1/K) Σ_k σ(a_i)(1 − σ(a_i))·(L(h_k with h_i = 1) − L(h_k with h_i = 0)).

    Bias: none; it is the conditional expectation of the score function, given the other units.
    Variance: at most the score function's with any baseline that does not depend on h_i; zero for a loss
    linear in the gates.

    Cost: N + 1 evaluations per replica, N·(C − 1) + 1 for categorical units: the drawn gates in one call of the
    objective, all the changed ones in another, without gradient.

    Args:
        kind: ``"bernoulli"``, or ``"categorical"``: ĝ_ic = p_ic·(L(h with h_i = c) − Σ_c' p_ic' L(h with h_i = c')).

    >>> import torch
    >>> a = torch.zeros(1, 2, requires_grad=True)
    >>> value = LocalExpectation().surrogate(lambda h: h.prod(-1), a, torch.tensor([[[0.4, 0.6]]]))   # h = (1, 0)
    >>> value.sum().backward()
    >>> a.grad                                                        # ¼·(h_2, h_1)
    tensor([[0.0000, 0.2500]])

    Reference: M. Titsias, M. Lázaro-Gredilla, "Local Expectation Gradients for Black Box Variational Inference",
    2015, arXiv:1503.01494; S. Tokui, I. Sato, "Evaluating the Variance of Likelihood-Ratio Gradient
    Estimators", 2017.
    """

    unbiased = True
    kinds = ("bernoulli", "categorical")
    reference = "Titsias, Lázaro-Gredilla 2015, arXiv:1503.01494; Tokui, Sato 2017"

    def estimate(
        self,
        objective: Objective,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *batch"],
        noise: Float[Tensor, "..."],
    ) -> Float[Tensor, "K *lead N"]:
        """Return σ(a)(1 − σ(a))·(L(h_i = 1) − L(h_i = 0)), or its form for classes."""
        exact = logits.to(wide(logits)).contiguous()
        others, weigh = _FORMS[self.form.name]
        values = others(gates)  # (S, K, *lead, N): the S further values of every unit
        count, lead = logits.shape[-self.event_dims], gates.dim() - self.event_dims
        units = torch.eye(count, dtype=torch.bool, device=logits.device)
        units = units.reshape(count, *(1,) * (1 + lead), count, *(1,) * (self.event_dims - 1))
        changed = torch.where(units, values, gates)  # (N, S, K, *lead, N)
        at = evaluate(objective, changed.flatten(0, 2), self.event_dims).unflatten(0, changed.shape[:3])
        at = at.to(exact.dtype).movedim(0, -1)  # (S, K, *batch, N)
        return weigh(exact, gates, losses, values, at)


def _opposite(gates: Tensor) -> Tensor:
    return (1 - gates).unsqueeze(0)


def _other_classes(gates: Tensor) -> Tensor:
    shifts = [gates.roll(shift, -1) for shift in range(1, gates.shape[-1])]
    return torch.stack(shifts) if shifts else gates.new_zeros(0, *gates.shape)


def _weigh_gates(logits: Tensor, gates: Tensor, losses: Tensor, others: Tensor, at: Tensor) -> Tensor:
    return (losses.unsqueeze(-1) - at[0]) * (2 * gates - 1) * logits.sigmoid() * (-logits).sigmoid()


def _weigh_classes(logits: Tensor, gates: Tensor, losses: Tensor, others: Tensor, at: Tensor) -> Tensor:
    # Class c has the loss of the one change that leads to it, or that of the drawn gates.
    each = gates * losses[..., None, None] + (others * at.unsqueeze(-1)).sum(0)
    probability = logits.softmax(-1)
    return probability * (each - (probability * each).sum(-1, keepdim=True))


# By kind: what else each unit could be, and the estimate from the losses there.
_FORMS = {"bernoulli": (_opposite, _weigh_gates), "categorical": (_other_classes, _weigh_classes)}
