"""Gaters: they say which units of a wide layer to compute. ``gater=`` takes a name of ``NAMES``, or a module.

A gater maps (..., D) to the logits of the gates, (..., G). Any module that does this is one. Two further members are
optional; :class:`Gater` has them:

* ``start_at(logit, target_rate)``: begin where gates have this logit, at which they fire at the target rate.
* ``flops``: what a token costs, if that is not what one forward pass of it costs.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from gatelet._checks import check_choice
from gatelet.nn.gaters.mlp import Gater as Gater
from gatelet.nn.gaters.mlp import glorot_ as glorot_
from gatelet.nn.gaters.own import PreviewGater as PreviewGater
from gatelet.nn.gaters.own import SelfGater as SelfGater
from gatelet.nn.gaters.own import ThresholdUnit as ThresholdUnit
from gatelet.nn.gaters.two_stage import CLOSED as CLOSED
from gatelet.nn.gaters.two_stage import TwoStageGater as TwoStageGater


class GaterError(ValueError):
    """A gater does not fit its layer: its width is wrong, or it costs more than it saves."""


ALL: Mapping[str, Callable[[int, int, int, bool], nn.Module]] = MappingProxyType(
    {"mlp": Gater, "two_stage": TwoStageGater}
)
"""Name -> how one is built from D, G, the bottleneck M and ``detach_input``."""
OWN: Mapping[str, type[SelfGater]] = MappingProxyType({"self": SelfGater, "preview": PreviewGater})
"""Name -> gater without a network: the layer's own numbers decide, by a threshold."""
NAMES = (*ALL, *OWN)


def resolve(
    gater: str | nn.Module, in_features: int, num_gates: int, bottleneck: int | None, detach_input: bool = False
) -> nn.Module:
    """Return the gater that was named, or the given module.

    Raises:
        TypeError: for what is neither a name nor a module.
        ValueError: for an unknown name, a name without ``bottleneck``, a module with it or with ``detach_input``.
    """
    if isinstance(gater, nn.Module):
        if bottleneck is not None:
            raise ValueError(f"bottleneck: is for a gater by name; gater is a {type(gater).__name__} of its own size")
        if detach_input:
            raise ValueError(
                f"detach_gater_input: is for a gater by name; gater is a {type(gater).__name__}, which may itself take "
                "x.detach()"
            )
        return gater
    if not isinstance(gater, str):
        raise TypeError(f"gater must be a name ({', '.join(NAMES)}) or a module, not {type(gater).__name__}")
    if check_choice(gater, NAMES, "gater") and bottleneck is None:
        raise ValueError(f"bottleneck: must be given, the width of the hidden layer of the gater {gater!r}")
    assert bottleneck is not None
    return ALL[gater](in_features, num_gates, bottleneck, detach_input)


def probe(gater: nn.Module, in_features: int, num_gates: int) -> int:
    """Return the FLOPs of a token in matrix products, twice the multiply-adds; see that the width is right.

    Raises:
        GaterError: for a gater that does not take (..., D), or gives anything but (..., G).
    """
    from torch.utils.flop_counter import FlopCounterMode  # brings triton along, which importing gatelet must not

    like = next((p for p in gater.parameters() if p.is_floating_point()), None)
    device, dtype = (torch.device("cpu"), torch.get_default_dtype()) if like is None else (like.device, like.dtype)
    x = torch.zeros(1, in_features, device=device, dtype=dtype)
    modes = [(module, module.training) for module in gater.modules()]
    try:
        gater.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            logits = gater(x)
    except Exception as error:
        raise GaterError(f"gater: does not take an input (..., {in_features}): {error}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != (1, num_gates):
        raise GaterError(
            f"gater: must give (..., {num_gates}) logits, one per gate, but gives {found} for an input "
            f"(1, {in_features})"
        )
    return int(counted.get_total_flops())
