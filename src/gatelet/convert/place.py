"""Puts gates into a block's owner, and finds them again."""

import sys
from typing import Any, TypeGuard, cast

import torch
from torch import nn

from gatelet.convert.block import METHOD, Block, BlockGating, Kind, Options, affine_at, at, holder_in
from gatelet.convert.run import Swapped, swapped


def put(owner: nn.Module, holder: nn.Module, block: Block, made: Options) -> str:
    """Give one block its gates, and return a description of it."""
    up, down = affine_at(owner, block.up), affine_at(owner, block.down)
    units, width = up.weight.shape
    with torch.device("meta" if up.weight.is_meta else "cpu"):  # inside from_pretrained another is the default
        gating = made.gating(width, units, 2 * ((2 if block.glu else 1) * width + down.weight.shape[0]))
    gating.block = block
    gating.to(up.weight).train(owner.training)
    holder.add_module("gating", gating)
    if not isinstance(owner, Swapped):
        owner.__dict__.pop(METHOD[block.kind], None)  # the class's own, as accelerate leaves it
        owner.__class__ = swapped(type(owner), block.kind)
        owner.__dict__["gated"] = frozenset()
    if block.kind == "sequential":
        owner.__dict__["gated"] |= {block.up}
    if block.kind == "pair":
        for path, kind in ((block.up, "up"), (block.down, "down")):
            module = at(owner, path)
            module.__class__ = swapped(type(module), cast(Kind, kind))
            module.__dict__["gating_of_pair"] = gating  # no submodule of it: the owner's
    sizes = " → ".join(map(str, (width, units, down.weight.shape[0])))
    return f"{sizes}, {'gated ' if block.glu else ''}{block.activation}"


def blocks(model: nn.Module) -> dict[str, tuple[nn.Module, BlockGating]]:
    """Return owner and gating of every converted block, by the name of its gating."""
    found: dict[str, tuple[nn.Module, BlockGating]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            of_sequential = [(key, holder_in(part)) for key, part in module.named_children() if key in module.gated]
            for key, holder in of_sequential if isinstance(module, nn.Sequential) else [("", module)]:
                gating = None if holder is None else holder._modules.get("gating")
                if isinstance(gating, BlockGating):
                    found[".".join(part for part in (name, key, "gating") if part)] = (module, gating)
    return found


REPLACED = "keep_rows or skip_inputs has replaced its maps by ones for inference"


def holds_rows(model: nn.Module) -> bool:
    """Whether maps were replaced by ones for inference (:func:`gatelet.convert.keep_rows`)."""
    return any(getattr(type(module), "holds_rows", False) for module in model.modules())


def why_no_block(model: nn.Module) -> str:
    """Say that a model holds no converted block."""
    return "model: holds no converted block" + (f": {REPLACED}, without a way back" if holds_rows(model) else "")


def without_nested_tensors(model: nn.Module) -> None:
    """Keep encoders off their fused path, which passes nested tensors that no kernel reads."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, Swapped) for m in module.layers):
            if not hasattr(module, "_dense_use_nested_tensor"):
                module._dense_use_nested_tensor = module.use_nested_tensor  # type: ignore[assignment]
            module.use_nested_tensor = False


def is_hugging_face(model: nn.Module) -> TypeGuard[Any]:
    """Whether this is a model of transformers, which describes itself in ``config.json``."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)
