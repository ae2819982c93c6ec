"""The exact gradient: the sum over all outcomes of a few units."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import Evaluating, Objective, evaluate
from gatelet.estimators._noise import NONE, wide

MAX_OUTCOMES = 1 << 16


class Enumeration(Evaluating):
    """The expected loss itself, summed over all outcomes of the gates, with its exact gradient.

    E[L] = Σ_h Π_i P(h_i)·L(h), over 2^N outcomes (C^N for categorical units), differentiated as it stands.

    Bias: none. Variance: none; there is no noise, and replicas change nothing. The surrogate's value is E[L], and
    whatever else the objective depends on receives the gradient of E[L]. Cost: 2^N evaluations in one call.

    Args:
        kind: ``"bernoulli"``, ``"categorical"`` or ``"subset"``: the sum is over the C(N, k) sets.
        k: for subset units, how many are open.

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
    law = NONE
    kinds = ("bernoulli", "categorical", "subset")
    reference = "Bengio, Léonard, Courville 2013, arXiv:1308.3432, proof of Theorem 1"

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the most probable gates; there is no noise, and the surrogate draws nothing."""
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
        log_mass = self.form.log_probability(logits.to(wide(logits)), gates)
        return (log_mass.exp() * losses).sum(0).to(losses.dtype)

    def outcomes(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "Q *lead N"]:
        """Return every outcome of the gates, for every example."""
        count = self.form.count(logits.shape)
        if count > MAX_OUTCOMES:
            raise ValueError(
                f"logits: {self.form.describe(logits.shape)} outcomes; Enumeration sums at most "
                f"{MAX_OUTCOMES}; the other estimators of gatelet.estimators.ALL take a sample of them"
            )
        index = torch.arange(count, device=logits.device)
        return self.form.outcomes(logits.shape, index).to(logits.dtype).expand(-1, *logits.shape)
