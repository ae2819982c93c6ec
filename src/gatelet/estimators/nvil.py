"""The score function with a baseline that a small network predicts from the logits."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gatelet._checks import check_count
from gatelet.estimators._base import Sampled
from gatelet.estimators._noise import wide


class NVIL(Sampled):
    """Score function whose baseline is learned: the loss, as a small network predicts it from the logits.

    ĝ = (h − σ(a))·(L − b(a)), b(a) = v·tanh(W a + c) + d, with W, c, v, d descending (L − b(a))². The
    squared error is part of the surrogate as a term of value zero: it has a gradient for W, c, v, d and for
    nothing else, so one ``backward()`` trains both.

    The four parameters are ordinary ones, found by ``parameters()`` of the model that holds the unit, or of
    this estimator where it is passed to :func:`gatelet.surrogate`: hand them to any optimiser. W gets its N columns at
    the first call, in place, so the optimiser may be made before; pass ``units`` where they must be there at once
    (DistributedDataParallel, ``torch.compile``). At the start b = 0: the plain score function.

    Bias: none, whatever the network predicts, since b(a) does not depend on this layer's h.
    Variance: that of the score function of L − b(a); the part of the loss that the logits predict is gone.

    Args:
        hidden: tanh units of the network.
        units: N, if the parameters are to be sized now.

    Raises:
        ValueError: when layers of different N share the baseline.

    >>> import torch
    >>> unit = NVIL(hidden=4, units=1)
    >>> a = torch.zeros(1, 3, 1, requires_grad=True)                  # one replica of three examples, one unit
    >>> h = unit(a, torch.full((1, 3, 1), 0.4))
    >>> zero = unit.signal(a, h, torch.tensor([[1.0, 2.0, 3.0]]))
    >>> zero.mean().backward()
    >>> a.grad.flatten()                                              # (h − ½)·(L − 0)/3
    tensor([0.1667, 0.3333, 0.5000])
    >>> unit.offset.grad                                              # −2·mean(L − 0)
    tensor([-4.])

    Reference: A. Mnih, K. Gregor, "Neural Variational Inference and Learning in Belief Networks", 2014,
    arXiv:1402.0030.
    """

    unbiased = True
    reference = "Mnih, Gregor 2014, arXiv:1402.0030"

    def __init__(self, hidden: int = 64, units: int | None = None) -> None:
        super().__init__()
        self.hidden, self.units = check_count(hidden, "hidden"), units
        self.weight = nn.Parameter(torch.zeros(hidden, 0))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.out = nn.Parameter(torch.zeros(hidden))
        self.offset = nn.Parameter(torch.zeros(1))
        if units is not None:
            self._size(check_count(units, "units"))

    def coefficients(
        self,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *lead"],
        noise: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "K *lead N"]:
        """Return (h − σ(a))·(L − b(a))."""
        return self.score(logits, gates, losses) * (losses - self.predict(logits).detach().to(losses.dtype)).unsqueeze(
            -1
        )

    def signal(
        self,
        logits: Float[Tensor, "K *lead N"],
        gates: Float[Tensor, "K *lead N"],
        losses: Float[Tensor, "K *rest"],
        noise: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "K *rest"]:
        """Return a zero with the gradient of the coefficients for the logits, of (L − b)² for the baseline."""
        zero = super().signal(logits, gates, losses, noise)
        prediction = self.predict(logits)
        target = losses.detach().to(prediction.dtype)
        target = target.reshape(target.shape + (1,) * (prediction.dim() - target.dim()))
        error = (target - prediction).square().unsqueeze(-1).flatten(losses.dim()).mean(-1)
        return zero + (error - error.detach()).to(losses.dtype)

    def predict(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead"]:
        """Return b(a), the loss that the network predicts; it sends no gradient to the logits."""
        units = logits.shape[-1]
        if self.weight.shape[1] == 0:
            self._size(units)
        if self.weight.shape[1] != units:
            raise ValueError(
                f"estimator: this NVIL predicts the loss from {self.weight.shape[1]} logits and was called with {units}"
                "; give each layer an instance of its own"
            )
        a = logits.detach().to(wide(logits))
        weight, bias, out, offset = (p.to(a.dtype) for p in (self.weight, self.bias, self.out, self.offset))
        return torch.tanh(F.linear(a, weight, bias)) @ out.to(a.dtype) + offset

    def _size(self, units: int) -> None:
        # The parameter stays the object that an optimiser may hold. Numpy's numbers, of a fixed seed: the first
        # call must not move torch's generator. Outside of any torch.func transform that is running: what is made in one
        # belongs to it, and dies with it.
        start = np.random.default_rng(0).uniform(-1, 1, (self.hidden, units)) * math.sqrt(3 / max(1, units))
        with torch._C._DisableFuncTorch():
            self.weight.data = torch.from_numpy(start).to(self.weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The number of columns comes with the first call, or with the checkpoint.
        if self.weight.shape[1] == 0 and prefix + "weight" in state_dict:
            self.weight.data = self.weight.new_zeros(self.hidden, state_dict[prefix + "weight"].shape[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)
