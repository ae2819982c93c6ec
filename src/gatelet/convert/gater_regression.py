"""Where the fitting of gaters begins: least squares for a network, a scale for a gater that decides by itself."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.nn.gaters import Gater, SelfGater

RIDGE = 1e-3
"""Ridge of the regression, as a share of the inputs' mean variance."""
LINEAR = 0.2
"""Standard deviation of tanh's argument, small enough that tanh is nearly linear."""
SPREAD = 2.0
"""Standard deviation of the logits, over tokens and gates."""
TOKENS = 32
"""This many inputs per feature are enough."""
ENOUGH = 4096
"""This many inputs are enough for a scale."""


class GaterRegression:
    """The affine map of rank M that comes nearest to given targets of the logits, as a gater's weights.

    Reduced-rank regression: B* = argmin Σ_t ‖B (x_t − x̄) − (y_t − ȳ)‖² over B (G, D) of rank M. With the inputs'
    covariance L Lᵀ and the least-squares solution B of full rank, B* = B L U Uᵀ L⁻¹, U the M leading left singular
    vectors of (B L)ᵀ. The bottleneck takes Uᵀ L⁻¹ (x − x̄), scaled to where tanh is nearly linear. It costs one pass
    over the data and an eigenvalue problem of size D; the sums are kept, the data is not.

    Args:
        gater: gives the sizes D, M and G, dtype and device.

    >>> import torch
    >>> x, true = torch.randn(500, 8), torch.randn(8, 3) @ torch.randn(3, 20)
    >>> fitted = GaterRegression(gater := Gater(8, 20, bottleneck=3))
    >>> fitted.add(x, x @ true)
    >>> fitted.write()
    True
    >>> bool(((gater(x) > 0) == (x @ true > 0)).float().mean() > 0.97)
    True

    Reference: A. J. Izenman, "Reduced-rank regression for the multivariate linear model", Journal of Multivariate
    Analysis 5, 1975.
    """

    def __init__(self, gater: Gater) -> None:
        self.gater = gater
        width, gates = gater.hidden.in_features, gater.gates.out_features
        like = gater.hidden.weight.new_empty(0, dtype=torch.float64)
        self.count = 0
        self.sum_x, self.sum_y = like.new_zeros(width), like.new_zeros(gates)
        self.xx, self.xy = like.new_zeros(width, width), like.new_zeros(width, gates)
        self.before = [parameter.detach().clone() for parameter in gater.parameters()]

    @property
    def enough(self) -> bool:
        """Whether more inputs would hardly change what is written."""
        return self.count >= TOKENS * len(self.sum_x)

    @torch.no_grad()
    def add(self, x: Float[Tensor, "T D"], y: Float[Tensor, "T G"]) -> None:
        """Add inputs and the logits' targets; only the proportions of the targets matter."""
        self.count += len(x)
        self.sum_x += x.sum(0)
        self.sum_y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    @torch.no_grad()
    def write(self) -> bool:
        """Set the gater's weights; False, and nothing is set, where the inputs do not determine them."""
        hidden, gates = self.gater.hidden, self.gater.gates
        mean_x, mean_y = self.sum_x / max(1, self.count), self.sum_y / max(1, self.count)
        covariance = self.xx / max(1, self.count) - mean_x.outer(mean_x)
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
        root, failed = torch.linalg.cholesky_ex(covariance)
        if bool(failed):
            return False
        # (B L)ᵀ, and the eigenvectors of its square on the smaller side.
        inner = torch.linalg.solve_triangular(root, self.xy / self.count - mean_x.outer(mean_y), upper=False)
        rank = hidden.out_features
        directions = torch.linalg.eigh(inner @ inner.T).eigenvectors[:, -rank:]  # (D, min(M, D))
        loadings = inner.T @ directions
        spread = (loadings.square().sum(1) + mean_y.var(correction=0)).mean().sqrt()
        if not bool(spread.isfinite() & (spread > 0)):
            return False
        into = torch.linalg.solve_triangular(root.T, directions, upper=True).T * LINEAR
        hidden.weight.zero_()
        hidden.bias.zero_()
        gates.weight.zero_()
        hidden.weight[: len(into)] = into.to(hidden.weight)
        hidden.bias[: len(into)] = -(into @ mean_x).to(hidden.bias)
        gates.weight[:, : len(into)] = (loadings * (SPREAD / spread / LINEAR)).to(gates.weight)
        gates.bias.copy_(mean_y * (SPREAD / spread))
        return True

    @torch.no_grad()
    def undo(self) -> None:
        """Give the gater back the weights that it had."""
        for parameter, value in zip(self.gater.parameters(), self.before, strict=True):
            parameter.copy_(value)


class ScaleFit:
    """The scale of a :class:`gatelet.nn.SelfGater`: what its units' activations are multiplied by on average.

    s_n = ‖W2 column n‖ · √mean (W1 x + b1)²_n; without W_g, and of a :class:`gatelet.nn.PreviewGater`, ‖W2 column n‖.

    >>> import torch
    >>> fitted = ScaleFit(gater := SelfGater(2, 2))
    >>> fitted.add(torch.tensor([[3.0, 0.0], [3.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
    >>> fitted.write()
    True
    >>> gater.scale
    tensor([3.0000, 2.8284])
    """

    def __init__(self, gater: SelfGater) -> None:
        self.gater, self.before = gater, gater.scale.clone()
        self.count, self.sum = 0, torch.zeros_like(gater.scale, dtype=torch.float64)
        self.norms = torch.ones_like(gater.scale)

    @property
    def enough(self) -> bool:
        """Whether more inputs would hardly change what is written."""
        return self.count >= ENOUGH

    @torch.no_grad()
    def add(self, factor: Float[Tensor, "T N"], w_down: Float[Tensor, "O N"]) -> None:
        """Add what the activations are multiplied by, and W2."""
        self.count += len(factor)
        self.sum += factor.square().sum(0)
        self.norms = w_down.norm(dim=0)

    @torch.no_grad()
    def add_alone(self, w_down: Float[Tensor, "O N"]) -> None:
        """Nothing but W2 multiplies the activations: no input has to be seen."""
        self.count, self.sum, self.norms = ENOUGH, torch.full_like(self.sum, ENOUGH), w_down.norm(dim=0)

    def write(self) -> bool:
        """Set the scale; False, and nothing is set, where it would be zero throughout or not finite."""
        scale = (self.sum / max(1, self.count)).sqrt().to(self.norms) * self.norms
        if not bool(scale.isfinite().all() & (scale > 0).any()):
            return False
        self.gater.scale.copy_(scale)
        return True

    def undo(self) -> None:
        """Give the gater back the scale that it had."""
        self.gater.scale.copy_(self.before)
