"""Activation checkpointing: whether a forward pass repeats an earlier one, and what the earlier one recorded.

``torch.utils.checkpoint`` runs a module again during the backward pass, to obtain the values that it did not keep.
The second run must do what the first did (same noise, same state of the controllers), and must not change any state
again.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor

KEPT = 256
"""How many first passes are remembered until their repetition: more than a pipeline has micro-batches at a time."""
SAMPLE = 64
"""How many numbers of the input distinguish passes that drew no noise."""


def recomputing() -> bool:
    """Whether this runs during a backward pass, where a module's forward can only be a repetition."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def to_be_repeated() -> bool:
    """Whether this pass may be repeated: activation checkpointing, or other code, decides what is kept of it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _Pass:
    """A first pass: how to recognise it, and what it recorded."""

    def __init__(self, x: Tensor, state: Tensor | None, values: Any) -> None:
        self.shape, self.state, self.values = x.shape, state, values
        self.sample = _sample(x)
        self.repeated = False

    def drew(self, state: Tensor | None) -> bool:
        return self.state is None or (state is not None and torch.equal(self.state, state))


class Passes:
    """The first passes of one module that may be repeated.

    A repetition is recognised by the state of torch's random generator, which checkpointing restores: a pass that draws
    the same noise is the same pass. If no noise is drawn, several passes may have the same state; then their inputs
    distinguish them.
    """

    def __init__(self) -> None:
        self._kept: deque[_Pass] = deque(maxlen=KEPT)

    def remember(self, x: Tensor, values: Any, draws: bool) -> None:
        """Keep what this pass sees, if it may be repeated; ``draws``: it takes noise from torch's generator."""
        if self._kept and all(each.repeated for each in self._kept):
            self._kept.clear()  # a new step: the old one's backward pass is over
        if to_be_repeated():
            self._kept.append(_Pass(x, _random_state(x.device) if draws else None, values))

    def recall(self, x: Tensor, draws: bool, who: str) -> Any:
        """Return what the first pass saw that this one repeats; None if there was none (it ran without gradients).

        Raises:
            RuntimeError: if there was one, but from another state of the random generator.
        """
        alike = [each for each in self._kept if each.shape == x.shape]
        if not alike:
            return None
        state = _random_state(x.device) if draws else None
        found = [each for each in alike if each.drew(state)]
        if not found:
            raise RuntimeError(
                f"{who}: activation checkpointing repeats this forward pass with other noise than its first run had, "
                "so its gradients would belong to other gates; call checkpoint(..., preserve_rng_state=True), the "
                "default"
            )
        if len(found) > 1:
            sample = _sample(x)
            apart = [float((each.sample - sample).abs().nan_to_num().sum()) for each in found]
            found = [each for each, distance in zip(found, apart, strict=True) if distance == min(apart)]
        best = next((each for each in found if not each.repeated), found[0])
        best.repeated = True
        return best.values

    def __deepcopy__(self, memo: Any) -> "Passes":
        return Passes()

    def __reduce__(self) -> Any:
        return Passes, ()


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)].clone()


def _random_state(device: torch.device) -> Tensor:
    if device.type in ("cpu", "meta"):
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state
