"""Converted blocks for inference alone: weights by unit in float32, bfloat16 or int8, few calls per token."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gatelet._checks import check_choice
from gatelet.convert.block import BlockGating, affine_at
from gatelet.convert.place import blocks
from gatelet.kernels import ACTIVATIONS as FUSED
from gatelet.kernels import Int8Rows, int8_rows, narrow_ffn, narrow_input_linear, narrow_linear
from gatelet.nn.conditional_ffn import ACTIVATIONS
from gatelet.nn.gaters import SelfGater

KEPT = ("float32", "bf16", "int8")


class RowsFFN(nn.Module):
    """A converted block whose weights cannot learn any more: rows of open units are all that a token reads.

    y = W2 (act(W_g x + b_g) ∘ (W1 x + b1) ∘ h) + b2, h = 1[gater(x) > threshold], as the block computed it in
    ``eval()``; without W_g, y = W2 (act(W1 x + b1) ∘ h) + b2. Sums are formed in float32. Products with int8 rows are
    off by at most half a step per number (:func:`gatelet.kernels.int8_rows`); bfloat16 by 2⁻⁹ of each.

    Args:
        owner, gating: the converted block.
        weights: how its weights are kept: ``"float32"``, ``"bf16"`` or ``"int8"``. The gater's stay float32.

    Raises:
        ValueError: for a gate that is not 0 or 1, or one without a threshold.
    """

    def __init__(self, owner: nn.Module, gating: BlockGating, weights: str = "float32") -> None:
        super().__init__()
        block, unit = gating.block, gating.unit
        if not unit.estimator.settles():
            raise ValueError(f"model: gates of {type(unit.estimator).__name__} are more than 0 or 1 by a threshold")
        if bool(unit.threshold.isnan()):
            raise ValueError("model: its gates have no threshold yet; distil or calibrate first")
        self.gater, self.activation, self.weights = gating.gater, block.activation, weights
        self.limit = float(unit.threshold)
        self.sparsity = gating.sparsity
        first = affine_at(owner, block.glu or block.up)
        self._keep("first", first.weight, first.bias, weights)
        if block.glu is not None:
            self._keep("up", *affine_at(owner, block.up), weights)
        down = affine_at(owner, block.down)
        self._keep("down", down.weight.t(), down.bias, weights)
        self.gated = block.glu is not None

    def _keep(self, name: str, weight: Tensor, bias: Tensor | None, weights: str) -> None:
        weight = weight.detach()
        if weights == "int8":
            kept = int8_rows(weight)
            self.register_buffer(f"{name}_values", kept.values)
            self.register_buffer(f"{name}_scales", kept.scales)
        else:
            dtype = torch.bfloat16 if weights == "bf16" else torch.float32
            self.register_buffer(f"{name}_values", weight.to(dtype).contiguous().clone())
        self.register_buffer(f"{name}_bias", None if bias is None else bias.detach().float().clone())

    def _apply(self, *args: Any, **named: Any) -> "RowsFFN":
        # model.to(bfloat16) is for the rest of the model: scales and the gater's weights stay what they are
        probe = args[0](torch.zeros(1))
        if probe.device.type != "cpu":
            raise ValueError("model: rows of few bytes are for the CPU")
        return self

    def _rows(self, name: str) -> Tensor | Int8Rows:
        values = cast(Tensor, self._buffers[f"{name}_values"])
        return Int8Rows(values, cast(Tensor, self._buffers[f"{name}_scales"])) if self.weights == "int8" else values

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead O"]:
        """Return y, in x's dtype."""
        own = x.float()
        bias, down_bias = self._buffers["first_bias"], self._buffers["down_bias"]
        if not isinstance(self.gater, SelfGater):
            logits = self.gater(own)
            for control in self.sparsity:
                logits = control.shift(logits)  # type: ignore[operator]
            gate = torch.gt(logits, self.limit, out=torch.empty_like(logits))
            third, third_bias = (self._rows("up"), self._buffers["up_bias"]) if self.gated else (None, None)
            if self.activation in FUSED:
                args = (gate, self.activation, self._rows("down"), down_bias)
                return narrow_ffn(own, self._rows("first"), bias, *args, w3=third, b3=third_bias).to(x.dtype)
            hidden = ACTIVATIONS[self.activation](narrow_linear(own, self._rows("first"), bias, gate)) * gate
            return self._rest(own, hidden).to(x.dtype)
        rows = self._rows("first")
        if self.weights == "float32":
            first = F.linear(own, cast(Tensor, rows), bias)
        else:
            first = narrow_linear(own, rows, bias, torch.ones(*own.shape[:-1], 1))
        first = ACTIVATIONS[self.activation](first)
        logits = first.abs().mul_(self.gater.scale)
        for control in self.sparsity:
            logits = control.shift(logits)  # type: ignore[operator]
        return self._rest(own, first.mul_(logits > self.limit)).to(x.dtype)

    def _rest(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Return W2 (hidden ∘ (W1 x + b1)) + b2, or W2 hidden + b2, reading rows where hidden is not zero."""
        down, bias = self._rows("down"), self._buffers["down_bias"]
        if self.gated:
            return narrow_ffn(x, self._rows("up"), self._buffers["up_bias"], hidden, "identity", down, bias)
        return narrow_input_linear(hidden, down, bias)

    def extra_repr(self) -> str:
        """Show how weights are kept."""
        return f"weights={self.weights!r}, activation={self.activation!r}, gated={self.gated}"


def keep_rows(model: nn.Module, weights: str = "int8") -> nn.Module:
    """Replace a model's converted blocks, in place, by ones for inference that keep their weights in few bytes.

    For decoding one token at a time on a CPU. There is no way back: save the model before.

    Args:
        model: converted and calibrated. Blocks that are modules of their own (Llama's, GPT-2's, T5's) are replaced.
        weights: ``"float32"``, ``"bf16"`` or ``"int8"`` (a scale per row).

    Returns:
        the same model, in ``eval()``.

    Raises:
        ValueError: for a model without such blocks, without thresholds, on another device than the CPU.

    >>> import torch, gatelet
    >>> from gatelet.convert import keep_rows
    >>> model = torch.nn.Sequential(gatelet.nn.ConditionalFFN(8, 32, 2))
    >>> keep_rows(model)
    Traceback (most recent call last):
        ...
    ValueError: model: holds no converted block that is a module of its own
    """
    check_choice(weights, KEPT, "weights")
    chosen = {name: (owner, gating) for name, (owner, gating) in blocks(model).items() if gating.block.kind == "module"}
    if not chosen or "gating" in chosen:
        raise ValueError("model: holds no converted block that is a module of its own")
    made = {name: RowsFFN(owner, gating, weights) for name, (owner, gating) in chosen.items()}
    for name, module in made.items():
        path = name.removesuffix(".gating")
        parent, _, key = path.rpartition(".")
        setattr(model.get_submodule(parent), key, module)
    return model.eval()
