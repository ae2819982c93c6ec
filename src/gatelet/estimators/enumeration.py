"""The exact gradient: the sum over all outcomes of a few units."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gatelet.estimators._base import Estimator, Kind, Objective, evaluate, one_hot, wide

MAX_OUTCOMES = 1 << 16


class Enumeration(Estimator):
    """The expected loss itself, summed over all outcomes of the gates, with its exact gradient.

    E[L] = Σ_h Π_i P(h_i)·L(h), over 2^N outcomes (C^N for categorical units), differentiated as it stands.

    Bias: none. Variance: none; there is no noise, and replicas change nothing. The surrogate's value is E[L], and
    whatever else the objective depends on receives the gradient of E[L]. Cost: 2^N evaluations in one call.

    Args:
        kind: ``"bernoulli"`` or ``"categorical"``.

    Raises:
        ValueError: for more than 65536 outcomes (16 binary units).

    >>> import torch
    >>> a = torch.tensor([[0.0, 1.0]], requires_grad=True)
    >>> value = Enumeration().surrogate(lambda h: h @ torch.tensor([2.0, 4.0]), a, torch.zeros(1, 1, 2))
    >>> value.sum().backward()
    >>> a.grad                                                        # w·σ(a)(1 − σ(a))
    tensor([[0.5000, 0.7864]])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, proof of Theorem 1.
    """

    unbiased = True
    needs = "objective"
    support = "none"
    law = "none"
    several_layers = False
    kinds = ("bernoulli", "categorical")
    reference = "Bengio, Léonard, Courville 2013, arXiv:1308.3432, proof of Theorem 1"

    def __init__(self, kind: Kind = "bernoulli") -> None:
        super().__init__(kind)
        self.law = "none"

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the most probable gates: without noise there is nothing to draw, and the surrogate draws nothing."""
        return self.threshold(logits)

    def surrogate(
        self,
        objective: Objective,
        logits: Float[Tensor, "*lead N"],
        noise: Float[Tensor, "..."],
    ) -> Float[Tensor, "*batch"]:
        """Return E[L], differentiable in the logits and in everything that the objective uses."""
        gates = self.outcomes(logits.detach())
        losses = evaluate(objective, gates, self.event_dims)
        exact = logits.to(wide(logits))
        if self.kind == "bernoulli":
            log_mass = torch.where(gates > 0, F.logsigmoid(exact), F.logsigmoid(-exact)).sum(-1)
        else:
            log_mass = (gates * exact.log_softmax(-1)).sum((-1, -2))
        return (log_mass.exp() * losses).sum(0).to(losses.dtype)

    def outcomes(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "Q *lead N"]:
        """Return every outcome of the gates, for every example."""
        units, values = (logits.shape[-1], 2) if self.kind == "bernoulli" else logits.shape[-2:]
        if values**units > MAX_OUTCOMES:
            raise ValueError(
                f"logits: {units} units of {values} values have {values}^{units} outcomes; Enumeration sums at most "
                f"{MAX_OUTCOMES}; the other estimators of gatelet.estimators.ALL take a sample of them"
            )
        index = torch.arange(values**units, device=logits.device)
        digits = index[:, None] // values ** torch.arange(units, device=logits.device) % values
        digits = digits.reshape(-1, *(1,) * (logits.dim() - self.event_dims), units)
        if self.kind == "bernoulli":
            return digits.to(logits.dtype).expand(-1, *logits.shape)
        return one_hot(digits.expand(-1, *logits.shape[:-1]), logits.expand(len(index), *logits.shape))
