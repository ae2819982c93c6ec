"""Each unit's effect on the loss, computed exactly while the other units keep their sample."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import Estimator, Kind, Objective, carry, evaluate, wide


class LocalExpectation(Estimator):
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
    needs = "objective"
    support = "none"
    several_layers = False
    kinds = ("bernoulli", "categorical")
    reference = "Titsias, Lázaro-Gredilla 2015, arXiv:1503.01494; Tokui, Sato 2017"

    def __init__(self, kind: Kind = "bernoulli") -> None:
        super().__init__(kind)

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the sample; it carries no gradient."""
        return self.sample(logits, noise)

    def surrogate(
        self,
        objective: Objective,
        logits: Float[Tensor, "*lead N"],
        noise: Float[Tensor, "..."],
    ) -> Float[Tensor, "*batch"]:
        """Return the mean loss over the replicas, with this estimator's gradient for the logits."""
        replicas = self.replicate(logits, noise)
        gates = self(replicas, noise)
        losses = evaluate(objective, gates, self.event_dims)
        with torch.no_grad():
            exact = replicas.to(wide(logits)).contiguous()
            others = self.others(gates)  # (S, K, *lead, N): the S further values of every unit
            units = torch.eye(logits.shape[-self.event_dims], dtype=torch.bool, device=logits.device)
            units = units.reshape(len(units), 1, *(1,) * (gates.dim() - self.event_dims), len(units))
            if self.kind == "categorical":
                units = units.unsqueeze(-1)
            changed = torch.where(units, others, gates)  # (N, S, K, *lead, N)
            at = evaluate(objective, changed.flatten(0, 2), self.event_dims).unflatten(0, changed.shape[:3])
            at = at.to(exact.dtype).movedim(0, -1)  # (S, K, *batch, N)
            if self.kind == "bernoulli":
                difference = (losses.unsqueeze(-1) - at[0]) * (2 * gates - 1)
                value = difference * exact.sigmoid() * (-exact).sigmoid()
            else:
                # Class c has the loss of the one change that leads to it, or that of the drawn gates.
                each = gates * losses[..., None, None] + (others * at.unsqueeze(-1)).sum(0)
                probability = exact.softmax(-1)
                value = probability * (each - (probability * each).sum(-1, keepdim=True))
        return (losses + carry(value, replicas, losses)).mean(0)

    def others(self, gates: Float[Tensor, "K *lead N"]) -> Float[Tensor, "S K *lead N"]:
        """Return what else each unit could be: the opposite gate, or the C − 1 other classes."""
        if self.kind == "bernoulli":
            return (1 - gates).unsqueeze(0)
        shifts = [gates.roll(shift, -1) for shift in range(1, gates.shape[-1])]
        return torch.stack(shifts) if shifts else gates.new_zeros(0, *gates.shape)
