"""The K-sample bound, whose learning signals are local to each sample."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import Evaluating, Objective, carry
from gatelet.estimators._noise import wide


class VIMCO(Evaluating):
    """Score function of the K-sample bound, each sample's signal being what it adds to the bound.

    L̂ = −log (1/K) Σ_k exp(−L_k); ĝ = Σ_k (h_k − σ(a))·(L̂ − L̂_{−k}), where L̂_{−k} is L̂ with L_k replaced by
    the mean of the other losses (the geometric mean of the other weights exp(−L_j)).

    The surrogate's value is L̂, not the mean loss; with L = −log(p(x, h)/q(h)) it is the negative importance-weighted
    bound. Whatever else the losses depend on receives Σ_k w_k ∂L_k, w = softmax(−L), the gradient of L̂.

    Bias: none, for the gradient of E[L̂]; L̂_{−k} does not depend on h_k. (E[L̂] is below E[L].)
    Variance: each sample's signal is what it alone adds to L̂; what the samples have in common cancels. No state.

    Args:
        kind: ``"bernoulli"``, or ``"categorical"``: h one-hot, softmax(a) in place of σ(a).

    >>> import torch
    >>> a = torch.zeros(1, 1, requires_grad=True)                     # one example, one unit
    >>> noise = torch.tensor([[[0.4]], [[0.6]]])                      # h_1 = 1, h_2 = 0
    >>> bound = VIMCO().surrogate(lambda h: h.sum(-1), a, noise)
    >>> bound                                                         # −log ½(e⁻¹ + 1)
    tensor([0.3799], grad_fn=<AddBackward0>)
    >>> torch.autograd.grad(bound.sum(), a)[0]                        # ½·(L̂ − 0) − ½·(L̂ − 1)
    tensor([[0.5000]])

    Reference: A. Mnih, D. Rezende, "Variational inference for Monte Carlo objectives", 2016, arXiv:1602.06725.
    """

    unbiased = True
    replicas = 2
    kinds = ("bernoulli", "categorical")
    reference = "Mnih, Rezende 2016, arXiv:1602.06725"

    def surrogate(
        self,
        objective: Objective,
        logits: Float[Tensor, "*lead N"],
        noise: Float[Tensor, "..."],
    ) -> Float[Tensor, "*batch"]:
        """Return the bound L̂, with this estimator's gradient for the logits."""
        replicas, gates, losses = self.begin(objective, logits, noise)
        with torch.no_grad():
            exact = losses.to(wide(losses))
            samples = exact.shape[0]
            others = (exact.sum(0) - exact) / max(1, samples - 1)
            own = torch.eye(samples, dtype=torch.bool, device=exact.device)
            own = own.reshape(samples, samples, *(1,) * (exact.dim() - 1))
            signal = bound(exact, 0) - bound(torch.where(own, others, exact), 1)
            value = self.form.spread(signal) * (gates - self.probability(replicas.to(signal.dtype)))
        return bound(losses, 0) + carry(value, replicas, losses).sum(0)


def bound(losses: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """Return −log of the mean of exp(−L) along one dimension."""
    return math.log(losses.shape[dim]) - torch.logsumexp(-losses, dim)
