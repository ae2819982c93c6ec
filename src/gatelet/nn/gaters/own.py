"""Gates that a layer decides by its own activation, without a gater network."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet._checks import check_count
from gatelet.units import StochasticUnit


class SelfGater(nn.Module):
    """Logits that are the layer's own activation: s ∘ |act(W_g x)|, or s ∘ |act(W1 x)| in a layer without W_g.

    It is not trained: the map that is computed in full anyway says which units matter. With s = 1, as it begins, this
    is CATS. :func:`gatelet.distil` sets s_n to what unit n's activation is multiplied by on the way to the output,
    ‖W2 column n‖ times the root mean square of (W1 x)_n, where that lowers the block's error.
    It costs that map, D N multiply-adds; its closed units save the layer's other maps.

    Args:
        in_features: D.
        num_gates: N.

    Raises:
        ValueError: for a size that is not an integer of at least 1.

    >>> import torch
    >>> SelfGater(8, 2)(torch.zeros(1, 8), torch.tensor([[-3.0, 0.5]]))
    tensor([[3.0000, 0.5000]])

    Reference: D. Lee, J.-Y. Lee, G. Zhang, M. Tiwari, A. Mirhoseini, "CATS: Contextually-Aware Thresholding for
    Sparsity in Large Language Models", 2024, arXiv:2404.08763.
    """

    scale: Tensor

    def __init__(self, in_features: int, num_gates: int) -> None:
        super().__init__()
        self.in_features = check_count(in_features, "in_features")
        self.num_gates = check_count(num_gates, "num_gates")
        self.register_buffer("scale", torch.ones(num_gates))

    def forward(self, x: Float[Tensor, "*lead D"], activation: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return s ∘ |activation|, without a gradient."""
        return activation.detach().abs() * self.scale

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.in_features}, {self.num_gates}"


class PreviewGater(SelfGater):
    """Logits that are what a unit adds to the layer's output: s ∘ |act(W_g x) ∘ (W1 x)|, or s ∘ |act(W1 x)|.

    This is the best measure for a threshold, but it is known only after W_g x and W1 x: closed units save only W2, a
    third of a block with W_g. :func:`gatelet.convert.keep_rows` adds int8 copies of W_g and W1 to decide by, which are
    fewer bytes; then W_g, W1 and W2 are read for open units only. Nothing is trained. s starts at 1, where all units
    count equally; :func:`gatelet.distil` sets s_n = ‖W2 column n‖ if that lowers the block's error.

    Args:
        in_features: D.
        num_gates: N.

    Raises:
        ValueError: for a size that is not an integer of at least 1.

    >>> import torch
    >>> PreviewGater(8, 2)(torch.zeros(1, 8), torch.tensor([[-3.0, 0.5]]))
    tensor([[3.0000, 0.5000]])

    Reference: none; the threshold on a unit's own activation comes from CATS (:class:`SelfGater`).
    """


class ThresholdUnit(StochasticUnit):
    """Gates that open above the calibrated threshold, in training as in ``eval()``; no gradient passes through them.

    Args:
        target_rate: what :func:`gatelet.sparsity.calibrate_thresholds` aims at; until then a call raises.

    >>> import torch
    >>> unit = ThresholdUnit(0.5)
    >>> _ = unit.threshold.fill_(1.0)
    >>> unit(torch.tensor([0.5, 1.5]))
    tensor([0., 1.])
    """

    def __init__(self, target_rate: float | None = None) -> None:
        super().__init__("straight_through_open", None, target_rate)

    def forward(
        self,
        logits: Float[Tensor, "*lead N"],
        *,
        noise: Float[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*lead N"]:
        """Return 1[logit > threshold]; raise for logits that are not finite, or without a threshold."""
        return self.settle(logits)
