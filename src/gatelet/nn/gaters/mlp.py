"""Section 5: the gater, a cheap network that says which units of a wide layer to compute."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet._checks import check_count, check_input


class Gater(nn.Module):
    """Logits of the gates: affine → M tanh units (the bottleneck) → affine.

    a = V tanh(U x + c) + d (section 5). Cost O(M(D + N)) per example, against O(D N) of the layer it gates.

    Weights are drawn as in the paper (A.4): U uniform in ±√(6/(D + M)), V uniform in ±4√(6/(M + N)), biases 0.

    Args:
        in_features: D.
        num_gates: N.
        bottleneck: M.
        detach_input: let no gradient pass from the gates into the input (the original code's choice; it
            matters only where layers are stacked).

    Raises:
        ValueError: for a size that is not an integer of at least 1.

    >>> import torch
    >>> Gater(784, 2000, bottleneck=400)(torch.zeros(32, 784)).shape
    torch.Size([32, 2000])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 5 and supplement A.4.
    """

    def __init__(self, in_features: int, num_gates: int, bottleneck: int, detach_input: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(check_count(in_features, "in_features"), check_count(bottleneck, "bottleneck"))
        self.gates = nn.Linear(bottleneck, check_count(num_gates, "num_gates"))
        self.detach_input = detach_input
        with torch.no_grad():
            glorot_(self.hidden)
            glorot_(self.gates, gain=4.0)

    def start_at(self, logit: float, target_rate: float) -> None:
        """Set the biases to where all gates have this logit."""
        nn.init.constant_(self.gates.bias, logit)

    def forward(self, x: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead N"]:
        """Return the logits, (..., N); raise for an input that is not floating and finite, or of another width."""
        check_input(x, self.hidden.weight)
        logits: Tensor = self.gates(self.hidden(x.detach() if self.detach_input else x).tanh())
        return logits


def glorot_(linear: nn.Linear, gain: float = 1.0) -> None:
    """Draw the weights uniformly in ±gain·√(6/(fan in + fan out)) and set the biases to 0."""
    bound = gain * math.sqrt(6 / (linear.in_features + linear.out_features))
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)
