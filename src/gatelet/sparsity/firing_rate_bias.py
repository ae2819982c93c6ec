"""Section 2.1: a cure for dead units, a bias that is pushed up while a unit fires too seldom."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_count, check_positive, check_rate
from gatelet.estimators import Estimator
from gatelet.estimators._distributed import batch_mean
from gatelet.sparsity._controller import Controller


class FiringRateBias(Controller):
    """Raises the bias of units that hardly ever open.

    Each unit's firing rate is kept as a moving average r_i ← decay·r_i + (1 − decay)·mean(h_i ≠ 0); while it
    is under the target, the unit's bias grows by ``step`` per batch (section 2.1). The bias is added to the
    logits and never lowered: the penalties keep rates from being too high.

    Args:
        target_rate: the firing rate under which a unit counts as dead.
        step: what a batch adds to the bias, in units of the logits.
        decay: the coefficient of the moving average, which starts at the target.
        units: N. A layer that has this controller sets it; otherwise the first call does.

    The buffers ``rate`` and ``bias``, (N,), are in ``state_dict``.

    >>> import torch, gatelet
    >>> control = FiringRateBias(0.1, step=0.5)
    >>> logits = torch.zeros(4, 2)
    >>> control.penalty(gatelet.estimators.StraightThrough(), logits, torch.tensor([[1.0, 0.0]] * 4))
    >>> control.shift(logits)[0]
    tensor([0.0000, 0.5000])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 2.1.
    """

    rate: Tensor
    bias: Tensor

    def __init__(self, target_rate: float, step: float = 0.01, decay: float = 0.99, units: int | None = None) -> None:
        super().__init__()
        self.target_rate = check_rate(target_rate)
        self.step = check_positive(step, "step")
        self.decay = check_rate(decay, "decay")
        self.register_buffer("rate", torch.zeros(0))
        self.register_buffer("bias", torch.zeros(0))
        self.units = units
        if units is not None:
            self.for_gates(check_count(units, "units"))

    def for_gates(self, count: int) -> None:
        """Give the buffers their size; where they have one, it stays."""
        if self.bias.numel() == 0:
            self.bias = self.bias.new_zeros(count)
            self.rate = self.rate.new_full((count,), self.target_rate)

    def shift(
        self, logits: Float[Tensor, "*lead N"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*lead N"]:
        """Return logits + bias."""
        if self.bias.numel() == 0:
            return logits
        if self.bias.numel() != logits.shape[-1]:
            raise ValueError(
                f"logits: this FiringRateBias keeps biases for {self.bias.numel()} units and was called with "
                f"{logits.shape[-1]}; give each layer an instance of its own"
            )
        return logits + self.bias.to(logits.dtype)

    def penalty(
        self, estimator: Estimator, logits: Float[Tensor, "*lead N"], gates: Float[Tensor, "*lead N"]
    ) -> Float[Tensor, ""] | None:
        """Update the rates and raise the biases of the units under the target; adds nothing to the loss."""
        with torch.no_grad():
            fired = batch_mean((gates != 0).to(self.rate.dtype))
            if fired is None:
                return None
            if self.bias.numel() == 0:
                self.to(fired.device).for_gates(fired.numel())
            self.rate.lerp_(fired, 1 - self.decay)
            self.bias.add_((self.rate < self.target_rate).to(self.bias.dtype), alpha=self.step)
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The buffers' size comes from the layer, with the first batch, or with the checkpoint.
        for name, start in (("rate", self.target_rate), ("bias", 0.0)):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.numel() == 0:  # of a controller that had seen no batch
                state_dict[prefix + name] = torch.full_like(getattr(self, name), start)
            elif saved is not None and getattr(self, name).numel() == 0:
                setattr(self, name, torch.zeros_like(saved, device=self.bias.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show the rate and the step."""
        return f"target_rate={self.target_rate:g}, step={self.step:g}, decay={self.decay:g}"
