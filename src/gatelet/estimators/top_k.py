"""The k largest logits of an example, and nothing else."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_count
from gatelet.estimators._base import Estimator
from gatelet.estimators._noise import NONE


class TopK(Estimator):
    """Keeps an example's k largest logits as they are and closes the others; back-propagation through the kept ones.

    h_i = a_i where a_i is among the k largest of the example's N, else 0; exactly k, also where logits tie.

    Bias: none; the gradient is exact wherever the order of the logits has no tie at rank k (unbiased, no variance). A
    closed unit receives none: only a change of the order opens it.

    Args:
        k: how many units stay open, in training and in ``eval()``; there is no rate to hold and no threshold to find.

    Raises:
        ValueError: for fewer than k logits.

    >>> import torch
    >>> a = torch.tensor([1.0, -1.0, 3.0], requires_grad=True)
    >>> h = TopK(k=2)(a, torch.zeros(3))
    >>> h.detach()
    tensor([1., 0., 3.])
    >>> torch.autograd.grad(h.sum(), a)[0]
    tensor([1., 0., 1.])

    Reference: A. Makhzani, B. Frey, "k-Sparse Autoencoders", 2013, arXiv:1312.5663; L. Gao et al., "Scaling and
    evaluating sparse autoencoders", 2024, arXiv:2406.04093.
    """

    unbiased = True
    needs = "path"
    support = "open"
    binary = False
    law = NONE
    rated = False
    reference = "Makhzani, Frey 2013, arXiv:1312.5663; Gao et al. 2024, arXiv:2406.04093"

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        self.k = check_count(k, "k")

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the logits where they are among the k largest, else 0."""
        return top_k(logits, self.k)

    def deterministic(self, logits: Float[Tensor, "*lead N"], threshold: Float[Tensor, ""]) -> Float[Tensor, "*lead N"]:
        """Return the same as in training."""
        return top_k(logits, self.k)

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return 1 for the k largest and 0 for the others; it has no derivative, and there is no rate to hold."""
        _, index = _largest(logits.detach(), self.k)
        return torch.zeros_like(logits).scatter(-1, index, 1.0)

    def logit_at(self, probability: float) -> float:
        """Return 0: whether a unit opens depends on the other logits only."""
        return 0.0

    def open_value(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return a."""
        return logits


def top_k(logits: Float[Tensor, "*lead N"], k: int) -> Float[Tensor, "*lead N"]:
    """Return the logits where they are among the k largest of the last dimension, else 0.

    The forward pass allocates one tensor of the size of ``logits``, its result, and the backward pass one, the
    gradient. In between only the k positions are kept.

    >>> import torch
    >>> top_k(torch.tensor([[1.0, 1.0, 3.0]]), 2).count_nonzero()     # a tie: still two
    tensor(2)
    """
    values, index = _largest(logits, k)
    return torch.zeros_like(logits).scatter(-1, index, values)


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k > logits.shape[-1]:
        raise ValueError(f"logits: top_k keeps k = {k} of them, but there are {logits.shape[-1]}")
    values, index = logits.topk(k, dim=-1, sorted=False)
    return values, index
