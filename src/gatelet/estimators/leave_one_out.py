"""The score function with the other replicas' mean loss as baseline."""

from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import Sampled


class LeaveOneOut(Sampled):
    """Score function whose baseline is the mean loss of the example's other replicas (RLOO, VarGrad).

    ĝ = (1/K) Σ_k (h_k − σ(a))·(L_k − (1/(K − 1)) Σ_{j≠k} L_j).

    Bias: none; the other replicas are independent of h_k, in every stochastic layer.
    Variance: with K ≥ 2 replicas, that of the score function with E[L] as baseline, times 1/K and about
    (1 + 1/(K − 1)). No state.

    Args:
        kind: ``"bernoulli"``, or ``"categorical"``: h one-hot, softmax(a) in place of σ(a); or ``"subset"``: the
            marginals P(h_i = 1) in place of σ(a).
        k: for subset units, how many are open.

    >>> import torch
    >>> unit = LeaveOneOut()
    >>> a = torch.zeros(2, 1, 1)                                     # two replicas of one example, one unit
    >>> h = unit(a, torch.tensor([[[0.4]], [[0.6]]]))
    >>> unit.coefficients(a, h, torch.tensor([[3.0], [1.0]])).flatten()
    tensor([1., 1.])

    Reference: W. Kool, H. van Hoof, M. Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019;
    A. Mnih, D. Rezende, "Variational inference for Monte Carlo objectives", 2016, arXiv:1602.06725.
    """

    unbiased = True
    replicas = 2
    kinds = ("bernoulli", "categorical", "subset")
    reference = "Kool, van Hoof, Welling 2019; Mnih, Rezende 2016, arXiv:1602.06725"

    def coefficients(
        self,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *lead"],
        noise: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "K *lead N"]:
        """Return (h − σ(a))·(L − mean of the others' L)."""
        others = (losses.sum(0) - losses) / (losses.shape[0] - 1)
        return self.score(logits, gates, losses) * (losses - others).unsqueeze(-1)
