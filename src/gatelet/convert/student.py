"""A converted block beside its dense twin in the teacher: what the fitting of one block needs."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatelet.convert.block import BlockGating, all_of, at, module_path
from gatelet.convert.gater_regression import GaterRegression, ScaleFit
from gatelet.convert.place import blocks
from gatelet.nn.conditional_ffn import ACTIVATIONS, hidden_layer
from gatelet.nn.gaters import Gater, PreviewGater, SelfGater


class Student:
    """A converted block, and its dense twin in the teacher, whose inputs and outputs it records."""

    def __init__(self, name: str, owner: nn.Module, gating: BlockGating, teacher: nn.Module) -> None:
        self.name, self.owner, self.gating, self.block = name, owner, gating, gating.block
        path = name.removesuffix("gating").rstrip(".")
        if self.block.kind == "sequential":
            path = path.removesuffix(self.block.up).rstrip(".")
        try:
            twin = teacher.get_submodule(path)
            self.first = twin.get_submodule(module_path(self.block.up))
            self.last = twin.get_submodule(module_path(self.block.down))
        except AttributeError as error:
            raise ValueError(f"teacher: has no block {path or '(the model)'!r} as the model has ({error})") from error
        if blocks(twin):
            raise ValueError(f"teacher: its block {path or '(the model)'!r} is converted too; give the dense model")
        self.x: Tensor | None = None
        self.y: Tensor | None = None

    def gater(self) -> list[nn.Parameter]:
        """Return the gater's parameters."""
        return list(self.gating.gater.parameters())

    def weights(self) -> list[nn.Parameter]:
        """Return the parameters of the block's own maps."""
        modules = {module_path(path): at(self.owner, path) for path in self.block.maps}
        return [p for module in modules.values() for p in module.parameters(False)]

    def hear(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Record the twin's input."""
        self.x = args[0].detach()

    def see(self, _: nn.Module, __: Any, out: Tensor) -> None:
        """Record the twin's output."""
        self.y = out.detach()

    def examples(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the recorded inputs (T, D) and outputs (T, O) of tokens that are not padding, and forget them."""
        if self.x is None or self.y is None:
            raise ValueError(f"teacher: does not run the block {self.name!r} in a forward pass")
        x, y, self.x, self.y = self.x, self.y, None, None
        if mask is not None and mask.shape == x.shape[:-1]:
            keep = mask.bool()
            x, y = x[keep], y[keep]
        else:
            x, y = (each.flatten(0, -2) if each.dim() > 1 else each[None] for each in (x, y))
        if not len(x):
            raise ValueError(f"loader: a batch holds no token for the block {self.name!r} (or padding only)")
        if not bool(torch.stack([x.sum(), y.sum()]).isfinite().all()):
            raise FloatingPointError(f"what the teacher's block of {self.name} takes or gives is not finite")
        return x, y

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits that decide the gates, before the controllers."""
        gater, block = self.gating.gater, self.block
        if not isinstance(gater, SelfGater):
            return cast(Tensor, gater(x))
        first = ACTIVATIONS[block.activation](F.linear(x, *all_of(self.owner, block.glu or block.up)))
        if block.glu is not None and isinstance(gater, PreviewGater):
            first = first * F.linear(x, *all_of(self.owner, block.up))
        return cast(Tensor, gater(x, first))

    @torch.no_grad()
    def margin(self, hidden: Tensor, w_down: Tensor) -> Tensor:
        """Return c − t: the cost in the output of closing each gate, less the cost at which a gate should just be
        open."""
        gating, target = self.gating, self.gating.unit.target_rate
        cost: Tensor = (hidden * w_down.norm(dim=0)).square()
        if gating.group_size > 1:
            cost = cost.unflatten(-1, (-1, gating.group_size)).sum(-1)
        return cost - top(cost, 0.5 if target is None else target)

    def beginning(self) -> GaterRegression | ScaleFit | None:
        """Return the regression that finds a first state of this gater, None if it starts as it is."""
        gater = self.gating.gater
        if isinstance(gater, SelfGater):
            return ScaleFit(gater)
        return GaterRegression(gater) if type(gater) is Gater else None

    @torch.no_grad()
    def add_to(self, fit: GaterRegression | ScaleFit, x: Tensor) -> None:
        """Give it these inputs, and what the gater should know of them."""
        up, down = all_of(self.owner, self.block.up), all_of(self.owner, self.block.down)
        glu = None if self.block.glu is None else all_of(self.owner, self.block.glu)
        if isinstance(fit, ScaleFit):
            if glu is None or isinstance(self.gating.gater, PreviewGater):
                fit.add_alone(down.weight)
            else:
                fit.add(F.linear(x, *up), down.weight)
            return
        margin = self.margin(hidden_layer(x, self.block.activation, up, glu), down.weight)
        fit.add(x, margin.sign() * margin.abs().sqrt())  # targets of the logits: sign(c − t) √|c − t|

    def losses(self, x: Tensor, y: Tensor, *, gater: bool, error: bool, weights: bool) -> dict[str, Tensor]:
        """Return the gater's loss and the block's normalised error with the gates that it opens now, as asked for."""
        gating, found = self.gating, {}
        up, down = all_of(self.owner, self.block.up), all_of(self.owner, self.block.down)
        glu = None if self.block.glu is None else all_of(self.owner, self.block.glu)
        target = gating.unit.target_rate
        with torch.set_grad_enabled(gater and torch.is_grad_enabled()):
            logits = self.logits(x)
            for controller in gating.sparsity:
                logits = controller.shift(logits)  # type: ignore[operator]
        with torch.set_grad_enabled(weights and torch.is_grad_enabled()):
            hidden = hidden_layer(x, self.block.activation, up, glu)
        if gater:
            margin = self.margin(hidden, down.weight)
            stake = margin.abs().sqrt()
            loss = (stake * F.softplus(-logits * margin.sign())).mean()
            found["gater"] = loss / stake.mean().clamp_min(torch.finfo(x.dtype).tiny)
        if error:
            gates = (logits > (0.0 if target is None else top(logits, target))).to(x.dtype)
            if gating.group_size > 1:
                gates = gates.repeat_interleave(gating.group_size, dim=-1)
            with torch.set_grad_enabled(weights and torch.is_grad_enabled()):
                have = F.linear(hidden * gates, down.weight, down.bias)
                variance = y.var(0, correction=0).mean().clamp_min(torch.finfo(x.dtype).tiny)
                found["error"] = (have - y).square().mean() / variance
        return found


def top(values: Tensor, share: float) -> Tensor:
    """Return the value above which this share of the values lies, from a sample of them."""
    # An odd step, so that not only a few units are picked.
    flat = values.detach().flatten()[:: max(1, values.numel() >> 16) | 1]
    return flat.kthvalue(min(flat.numel(), max(1, round((1 - share) * flat.numel())))).values


@contextlib.contextmanager
def recording(students: list[Student]) -> Iterator[None]:
    """Let all students record their twins inside the block."""
    hooks = [student.first.register_forward_pre_hook(student.hear) for student in students]
    hooks += [student.last.register_forward_hook(student.see) for student in students]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
