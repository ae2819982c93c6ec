"""What a sparsity controller is, and how its penalty reaches the loss."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet.estimators import Estimator


class Controller(nn.Module):
    """Holds a conditional layer's share of open gates at a target. Subclasses override one of two hooks."""

    def shift(
        self, logits: Float[Tensor, "*lead N"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*lead N"]:
        """Return the logits that the gates are drawn from; ``generator`` is the source of any noise in them."""
        return logits

    def penalty(
        self, estimator: Estimator, logits: Float[Tensor, "*lead N"], gates: Float[Tensor, "*lead N"]
    ) -> Float[Tensor, ""] | None:
        """Return what this batch adds to the loss (None: nothing) and update the state. Only in training."""
        return None


def penalty(model: nn.Module) -> Float[Tensor, ""]:
    """Sum of the sparsity penalties of the model's conditional layers, of the last forward pass.

    Args:
        model: any module that holds conditional layers.

    Returns:
        a scalar to add to the loss; zero in ``eval()``.

    Raises:
        ValueError: if the model holds no conditional layer.
        RuntimeError: if a layer is in training and has not run since its penalty was last taken.

    >>> import torch, gatelet
    >>> layer = gatelet.nn.ConditionalLinear(8, 16, bottleneck=4, estimator="straight_through", target_rate=0.1)
    >>> _ = layer(torch.randn(3, 8))
    >>> gatelet.sparsity.penalty(layer).requires_grad
    True
    """
    layers = [module for module in model.modules() if isinstance(module, Penalised)]
    if not layers:
        raise ValueError("model holds no conditional layer, so there is no sparsity penalty")
    terms = [layer.take_penalty() for layer in layers]
    return torch.stack([term.to(terms[0]) for term in terms]).sum()


class Penalised(nn.Module):
    """A layer with gates: keeps the penalty of its last forward pass until :func:`penalty` takes it."""

    def __init__(self) -> None:
        super().__init__()
        self._penalty: Tensor | None = None

    def take_penalty(self) -> Float[Tensor, ""]:
        """Return the penalty of the last forward pass and forget it, so that its graph can be freed."""
        term, self._penalty = self._penalty, None
        if not self.training:  # a penalty from before eval() is not of this forward pass
            return next(self.parameters()).new_zeros(())
        if term is None:
            raise RuntimeError(
                "sparsity.penalty(model): a conditional layer has not run in training since its penalty was "
                "last taken; call it after the forward pass, once"
            )
        return term

    def __getstate__(self) -> dict[str, object]:
        # A graph can be neither copied nor pickled: deepcopy(model) between forward and step must work.
        return {**super().__getstate__(), "_penalty": None}
