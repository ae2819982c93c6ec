"""Deterministic maps onto the simplex that close most units exactly: sparsemax and 1.5-entmax.

The package entmax (1.3) has both. It is not used: torch.func and torch.compile with ``fullgraph=True`` do not accept
the older style of its autograd functions, and the second derivative of its 1.5-entmax is wrong (docs/peers.md).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import Estimator
from gatelet.estimators._noise import NONE


class Sparsemax(Estimator):
    """The point of the simplex nearest to the logits: gates that sum to 1, most of them exactly 0.

    h = argmin over the simplex of |h − a|² = max(0, a − t), t such that the gates sum to 1. All units of an
    example together are one distribution.

    Bias: none, no noise; the gradient diag(s) − ssᵀ/|s|, s = 1[h > 0], is exact (unbiased, no variance). A closed unit
    neither sends nor receives one.

    >>> import torch
    >>> Sparsemax()(torch.tensor([1.0, 0.5, -1.0]), torch.zeros(3))
    tensor([0.7500, 0.2500, 0.0000])

    Reference: A. F. T. Martins, R. F. Astudillo, "From Softmax to Sparsemax: A Sparse Model of Attention and
    Multi-Label Classification", 2016, arXiv:1602.02068.
    """

    unbiased = True
    needs = "path"
    support = "open"
    binary = False
    law = NONE
    rated = False
    reference = "Martins, Astudillo 2016, arXiv:1602.02068"

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the gates; the noise is ignored."""
        return self.map(logits)

    def deterministic(self, logits: Float[Tensor, "*lead N"], threshold: Float[Tensor, ""]) -> Float[Tensor, "*lead N"]:
        """Return the same as in training."""
        return self.map(logits)

    def map(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return max(0, a − t)."""
        return sparsemax(logits)

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return 1[h > 0]; it has no derivative, and there is no rate to hold."""
        return (self.map(logits.detach()) > 0).to(logits.dtype)

    def logit_at(self, probability: float) -> float:
        """Return 0: whether a unit opens depends on the other logits."""
        return 0.0

    def open_value(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the gates themselves."""
        return self.map(logits)


class Entmax(Sparsemax):
    """Between softmax and sparsemax: gates that sum to 1, exactly 0 where the logit is far below the largest.

    h = max(0, a/2 − t)², t such that the gates sum to 1: α-entmax with α = 1.5.

    Bias: none, no noise; the gradient diag(r) − rrᵀ/Σr, r = √h, is exact (unbiased, no variance). A closed unit
    neither sends nor receives one.

    >>> import torch
    >>> Entmax()(torch.tensor([0.0, 0.0, -4.0]), torch.zeros(3))
    tensor([0.5000, 0.5000, 0.0000])

    Reference: B. Peters, V. Niculae, A. F. T. Martins, "Sparse Sequence-to-Sequence Models", 2019, arXiv:1905.05702.
    """

    reference = "Peters, Niculae, Martins 2019, arXiv:1905.05702"

    def map(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return max(0, a/2 − t)²."""
        return entmax15(logits)


def sparsemax(logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
    """Return max(0, a − t) with sum 1; autograd can differentiate it.

    >>> import torch
    >>> sparsemax(torch.zeros(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    logits = logits.contiguous()
    a = logits - logits.detach().amax(-1, keepdim=True) if logits.shape[-1] else logits
    ordered = a.detach().sort(-1, descending=True).values
    rank = torch.arange(1, a.shape[-1] + 1, device=a.device, dtype=a.dtype)
    inside = 1 + rank * ordered > ordered.cumsum(-1)
    least = torch.where(inside, ordered, torch.inf).amin(-1, keepdim=True) if a.shape[-1] else ordered
    is_open = (a.detach() >= least).to(a.dtype)
    t = ((a * is_open).sum(-1, keepdim=True) - 1) / is_open.sum(-1, keepdim=True)
    return is_open * (a - t).clamp_min(0.0)


def entmax15(logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
    """Return max(0, a/2 − t)² with sum 1; autograd can differentiate it.

    >>> import torch
    >>> entmax15(torch.zeros(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    logits = logits.contiguous()
    a = (logits - logits.detach().amax(-1, keepdim=True) if logits.shape[-1] else logits) / 2
    ordered = a.detach().sort(-1, descending=True).values
    rank = torch.arange(1, a.shape[-1] + 1, device=a.device, dtype=a.dtype)
    mean = ordered.cumsum(-1) / rank
    spread = ordered.square().cumsum(-1) - rank * mean.square()
    bound = mean - ((1 - spread).clamp_min(0.0) / rank).sqrt()
    inside = (bound <= ordered) & (spread < 1)
    least = torch.where(inside, ordered, torch.inf).amin(-1, keepdim=True) if a.shape[-1] else ordered
    is_open = (a.detach() >= least).to(a.dtype)
    count = is_open.sum(-1, keepdim=True)
    centre = (a * is_open).sum(-1, keepdim=True) / count
    around = ((a - centre) * is_open).square().sum(-1, keepdim=True)
    t = centre - ((1 - around).clamp_min(0.0) / count).sqrt()
    return (is_open * (a - t)).clamp_min(0.0).square()
