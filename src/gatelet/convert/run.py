"""The computation of a converted block, in a class that replaces its owner's."""

import functools
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatelet.convert.block import METHOD, BlockGating, Kind, Passed, affine_of, at, dropout_rate, holder_in, part_at
from gatelet.kernels import gated_input_linear, gated_linear, open_pattern
from gatelet.nn.conditional_ffn import ACTIVATIONS, feed_forward
from gatelet.nn.gaters import SelfGater
from gatelet.nn.parts import Affine, part_of


def run_block(owner: nn.Module, gating: BlockGating, x: Tensor) -> Tensor:
    """Return W2 (hidden ∘ h) + b2 of the owner's block, before any dropout of the output."""
    block = gating.block
    glu = None if block.glu is None else part_at(owner, block.glu)
    up, down = part_at(owner, block.up), part_at(owner, block.down)
    return feed_forward(x, gating, block.activation, up, down, glu, dropout_rate(owner, block.inner))


def _run(owner: nn.Module, x: Tensor) -> Tensor:
    gating = cast(BlockGating, owner._modules["gating"])
    out = run_block(owner, gating, x)
    if gating.block.outer is not None:
        out = at(owner, gating.block.outer)(out)
    return out


class Swapped(nn.Module):
    """Marks the classes that :func:`convert` gives to blocks' owners."""

    dense_class: type[nn.Module]
    kind: Kind
    gated: frozenset[str]
    """Of a Sequential: the names of its modules that hold gates."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.dense_class, self.kind), self.__getstate__()


def _rebuild(dense_class: type[nn.Module], kind: Kind) -> nn.Module:
    cls = swapped(dense_class, kind)
    return cls.__new__(cls)


_CLASSES: dict[tuple[type[nn.Module], Kind], type[nn.Module]] = {}


def swapped(dense_class: type[nn.Module], kind: Kind) -> type[nn.Module]:
    """Return a subclass that computes the block conditionally; everything else, state included, stays the class's."""
    if (dense_class, kind) not in _CLASSES:
        _CLASSES[dense_class, kind] = _subclass(dense_class, kind)
    return _CLASSES[dense_class, kind]


def _up(self: nn.Module, x: Tensor) -> Tensor:
    """Return W1 x + b1 at open units and zero at closed ones, which every known activation leaves at zero."""
    gating: BlockGating = self.__dict__["gating_of_pair"]
    gating.passed.pop(_caller(), None)
    own = affine_of(self)
    x, mask = gating.without_padding(x, None)
    if isinstance(gating.gater, SelfGater):
        out = F.linear(x, *own)
        gates, support = gating.decide_unpadded(x, mask, None, None, ACTIVATIONS[gating.block.activation](out))
        gating.passed[_caller()] = Passed(gates, None if gating.needs_dense(x, gates) else open_pattern(gates, 1))
        return out * gates
    gates, support = gating.decide_unpadded(x, mask, None, None)
    if _caller() in gating.adapted:  # the gates follow after what the adapter adds
        gating.passed[_caller()] = Passed(gates, None)
        return F.linear(x, *own)
    if gating.needs_dense(x, gates) or torch.compiler.is_compiling():
        gating.passed[_caller()] = Passed(gates, None)
        return F.linear(x, *own) * _by_unit(gates, gating)
    computed = gates if support is None else support.to(gates.dtype)
    pattern = open_pattern(computed, gating.group_size)
    gating.passed[_caller()] = Passed(gates, pattern)
    weight = gating.laid.rows("up", own.weight)
    return gated_linear(x, weight, own.bias, gates, pattern=pattern, active_fraction=gating.unit.target_rate)


def _down(self: nn.Module, hidden: Tensor) -> Tensor:
    """Return W2 hidden + b2, reading the units that W1 opened."""
    gating: BlockGating = self.__dict__["gating_of_pair"]
    passed = gating.passed.pop(_caller(), None)
    pattern = None if passed is None else passed.pattern
    if pattern is None or pattern.lead != hidden.shape[:-1]:
        return F.linear(hidden, *affine_of(self))
    own = affine_of(self)
    return gated_input_linear(hidden, pattern, gating.laid.columns("down", own.weight), own.bias)


def _by_unit(gates: Tensor, gating: BlockGating) -> Tensor:
    return gates.repeat_interleave(gating.group_size, -1) if gating.group_size > 1 else gates


def _closing(gating: BlockGating, adapted: bool) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    """Return a hook for what stands at W2's place: in this thread it closes the units that the gates closed."""
    caller = _caller()

    def close(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        passed = gating.passed.get(caller) if caller == _caller() else None
        if passed is None or (passed.gates.requires_grad and not adapted):  # W1's output has these gates' gradient
            return None
        return (args[0] * _by_unit(passed.gates, gating), *args[1:])

    return close


def _caller() -> int:
    """Return whose call this is: several Python threads may run one block."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _subclass(dense_class: type[nn.Module], kind: Kind) -> type[nn.Module]:

    def compute(self: nn.Module, x: Tensor) -> Tensor:
        return _run(self, x)

    def compute_bert(self: Any, x: Tensor) -> Tensor:
        return cast(Tensor, self.output.LayerNorm(_run(self, x) + x))

    def compute_sequential(self: nn.Module, x: Any) -> Any:
        until: str | None = None
        for name, module in self._modules.items():
            if until is not None:
                until = None if name == until else until
                continue
            if name not in self.__dict__["gated"]:
                x = cast(nn.Module, module)(x)
                continue
            holder = holder_in(cast(nn.Module, module))
            if holder is None:
                raise RuntimeError(
                    f"model: its {name!r} held the gates of a converted block and was replaced by a "
                    f"{type(module).__name__}, so they are gone; leave that module out (quantize_dynamic takes names: "
                    "{'2': default_dynamic_qconfig}), or gatelet.revert(model) first"
                )
            gating = cast(BlockGating, holder._modules["gating"])
            x, until = run_block(self, gating, x), gating.block.last
        return x

    @functools.wraps(dense_class.forward)
    def compute_pair(self: nn.Module, *args: Any, **named: Any) -> Any:
        gating = cast(BlockGating, self._modules["gating"])
        up, down = (at(self, path) for path in (gating.block.up, gating.block.down))
        if isinstance(part_of(up), Affine) and isinstance(part_of(down), Affine):
            return dense_class.forward(self, *args, **named)
        # An adapter or a hook of W1 may open closed units again. They are closed before W2.
        adapted, caller = not isinstance(up, Swapped), _caller()
        if adapted and isinstance(gating.gater, SelfGater):
            raise RuntimeError(f"model: {gating.block.up} decides which units are open; merge its adapter first")
        hook = down.register_forward_pre_hook(_closing(gating, adapted))
        if adapted:
            gating.adapted.add(caller)
        try:
            return dense_class.forward(self, *args, **named)
        finally:
            gating.adapted.discard(caller)
            hook.remove()

    methods = {"bert": compute_bert, "sequential": compute_sequential, "pair": compute_pair, "up": _up, "down": _down}
    body: dict[str, Any] = {"dense_class": dense_class, "kind": kind, METHOD[kind]: methods.get(kind, compute)}
    if kind == "transformer":
        # In eval() torch runs the whole layer fused where it can; that path would ignore the gates.
        body["activation_relu_or_gelu"] = property(lambda self: 0, lambda self, value: None)
    return type(f"Conditional{dense_class.__name__}", (Swapped, dense_class), body)
