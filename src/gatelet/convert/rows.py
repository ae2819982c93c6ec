"""A converted model for inference only: weights by unit in float32, bfloat16 or int8, few calls per token."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet._checks import check_choice, check_rate
from gatelet.convert.block import Block, BlockGating, Options, affine_at, all_of, at
from gatelet.convert.find import find
from gatelet.convert.place import REPLACED, blocks, is_hugging_face
from gatelet.kernels import ACTIVATIONS as FUSED
from gatelet.kernels import (
    Decided,
    Decode,
    Int8Rows,
    decode_ffn,
    decode_input_linear,
    decode_linear,
    int8_rows,
    narrow_ffn,
    narrow_input_linear,
    narrow_linear,
)
from gatelet.kernels.backends.numba.memory import empty as large_empty
from gatelet.nn.conditional_ffn import ACTIVATIONS
from gatelet.nn.gaters import PreviewGater, SelfGater
from gatelet.nn.parts import Affine, part_of
from gatelet.sparsity.calibration import run_on

KEPT = ("float32", "bf16", "int8")
SAMPLE = 1 << 15
"""This many inputs of a batch set a map's threshold."""
ALIGNED = 64
"""Weights begin at multiples of this many bytes."""
NEVER = -1.0
"""A limit that every size is above."""


class _Inference(torch.autograd.Function):
    """A result without a gradient, which says so when one is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "model: keep_rows or skip_inputs replaced some of its maps by ones for inference, which have no gradient"
        )


class _Rows(nn.Module):
    """Weights by unit, kept in few bytes; the kernel that decodes is prepared at the first call."""

    holds_rows = True

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.weights = weights
        self._ready: tuple[list[Tensor], Decode] | None = None

    def forward(self, x: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead O"]:
        """Return the map's value, in x's dtype.

        Raises:
            RuntimeError: by a backward pass that gets here.
        """
        with torch.no_grad():
            out = self._value(x)
        return cast(Tensor, _Inference.apply(x, out)) if torch.is_grad_enabled() and x.requires_grad else out

    def _value(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is no map")

    def _keep(self, name: str, weight: Tensor, bias: Tensor | None, weights: str | None = None) -> None:
        weight, weights = weight.detach(), weights or self.weights
        if weights == "int8":
            kept = int8_rows(weight)
            self.register_buffer(f"{name}_values", kept.values.contiguous())
            self.register_buffer(f"{name}_scales", kept.scales)
        else:
            dtype = torch.bfloat16 if weights == "bf16" else torch.float32
            self.register_buffer(f"{name}_values", weight.to(dtype).contiguous().clone())
        self.register_buffer(f"{name}_bias", None if bias is None else bias.detach().float().clone())

    def _rows(self, name: str) -> Tensor | Int8Rows:
        values, scales = self._buffers[f"{name}_values"], self._buffers.get(f"{name}_scales")
        return cast(Tensor, values) if scales is None else Int8Rows(cast(Tensor, values), scales)

    def _decode(self, make: Callable[[], Decode]) -> Decode:
        """Return the prepared kernel; it is prepared again after a buffer was replaced by another tensor."""
        now, ready = list(self._buffers.values()), self.__dict__["_ready"]
        if ready is None or any(one is not other for one, other in zip(now, ready[0], strict=True)):
            ready = self.__dict__["_ready"] = (now, make())
        return cast(Decode, ready[1])

    def _apply(self, *args: Any, **named: Any) -> "_Rows":
        # model.to(bfloat16) is for the rest of the model: scales and the gater's weights stay what they are
        probe = args[0](torch.zeros(1))
        if probe.device.type != "cpu":
            raise ValueError("model: rows of few bytes are for the CPU")
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Addresses of tensors can be neither copied nor pickled.
        return {**cast(dict[str, Any], super().__getstate__()), "_ready": None}


class RowsLinear(_Rows):
    """A linear map for inference: x Wᵀ + b, with rows in few bytes; its weights can no longer be trained.

    Args:
        linear: an affine map, nothing else.
        weights: ``"float32"``, ``"bf16"`` or ``"int8"``.
    """

    def __init__(self, linear: Affine, weights: str = "float32") -> None:
        super().__init__(weights)
        self._keep("map", *linear)

    def _value(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b."""
        return self._decode(lambda: decode_linear(self._rows("map"), self._buffers["map_bias"]))(x)

    def extra_repr(self) -> str:
        """Show how weights are kept."""
        units, width = self._rows("map").shape
        return f"{width}, {units}, weights={self.weights!r}"


class InputRows(_Rows):
    """A linear map that reads only the columns of inputs whose size is above a threshold (TEAL): x̃ Wᵀ + b.

    x̃_d = x_d where |x_d| > limit, 0 elsewhere. Its weights can no longer be trained.

    Args:
        linear: an affine map, nothing else.
        limit: the threshold.
        weights: ``"float32"``, ``"bf16"`` or ``"int8"`` (a scale per input).

    Reference: J. Liu, P. Ponnusamy, T. Cai, H. Guo, Y. Kim, B. Athiwaratkun, "Training-Free Activation Sparsity in
    Large Language Models", 2024, arXiv:2408.14690.
    """

    def __init__(self, linear: Affine, limit: float, weights: str = "float32") -> None:
        super().__init__(weights)
        self._keep("map", linear.weight.t(), linear.bias)
        self.register_buffer("limit", torch.tensor([limit]))
        self.register_buffer("norm", torch.ones(linear.weight.shape[1]))

    def _value(self, x: Tensor) -> Tensor:
        """Return x̃ Wᵀ + b."""
        return self._decode(self._made)(x)

    def _made(self) -> Decode:
        norm, limit = cast(Tensor, self._buffers["norm"]), cast(Tensor, self._buffers["limit"])
        return decode_input_linear(self._rows("map"), self._buffers["map_bias"], norm, limit)

    def extra_repr(self) -> str:
        """Show how weights are kept."""
        width, units = self._rows("map").shape
        return f"{width}, {units}, limit={float(cast(Tensor, self.limit)):g}, weights={self.weights!r}"


class RowsFFN(_Rows):
    """A converted block for inference: a token reads only the rows of open units; nothing can be trained any more.

    y = W2 (act(W_g x + b_g) ∘ (W1 x + b1) ∘ h) + b2, h = 1[gater(x) > threshold], as the block computed it in
    ``eval()``; without W_g, y = W2 (act(W1 x + b1) ∘ h) + b2. Sums are formed in float32. Products with int8 weights
    have an error of at most half a step per number (:func:`gatelet.kernels.int8_rows`; a scale per unit of W_g and W1,
    per output of W2), products with bfloat16 of 2⁻⁹ of each number. With float32 weights a
    :class:`gatelet.nn.PreviewGater` decides by additional int8 copies of W_g and W1. With bfloat16 or int8 weights it
    decides by these weights themselves, and only W2 is saved, because copies would cost as much as they save.

    Args:
        owner, gating: the converted block.
        weights: how its weights are kept: ``"float32"``, ``"bf16"`` or ``"int8"``. The gater's stay float32.

    Raises:
        ValueError: for a gate that is not 0 or 1, or one without a threshold; for a map that is more than its weight
            and bias (an adapter, hooks).
    """

    def __init__(self, owner: nn.Module, gating: BlockGating, weights: str = "float32") -> None:
        super().__init__(weights)
        block, unit = gating.block, gating.unit
        if not unit.estimator.settles():
            raise ValueError(f"model: gates of {type(unit.estimator).__name__} are more than 0 or 1 by a threshold")
        if bool(unit.threshold.isnan()):
            raise ValueError("model: its gates have no threshold yet; distil or calibrate first")
        self.gater, self.activation = _in_float32(gating.gater), block.activation
        self.sparsity = gating.sparsity
        self.gated = block.glu is not None
        first, down = all_of(owner, block.glu or block.up), all_of(owner, block.down)
        self._keep("first", *first)
        if self.gated:
            self._keep("up", *all_of(owner, block.up))
        self._keep_down(down.weight.detach(), down.bias)
        self.alone = isinstance(self.gater, SelfGater) and not len(self.sparsity) and self.activation in FUSED
        """Whether one kernel does all of it."""
        limit = float(unit.threshold)
        if not self.alone:
            self.register_buffer("limit", torch.tensor(limit))
            return
        self.preview = isinstance(self.gater, PreviewGater) and weights == "float32"
        if self.preview:
            self._keep("near_first", first.weight, None, "int8")
            if self.gated:
                self._keep("near_up", all_of(owner, block.up).weight, None, "int8")
        last = isinstance(self.gater, PreviewGater) and not self.preview
        self.register_buffer("limits", torch.tensor([NEVER, limit] if last else [limit, NEVER]))
        self.register_buffer("scale", self.gater.scale.detach().float().clone())

    def _keep_down(self, weight: Tensor, bias: Tensor | None) -> None:
        """Keep W2 (O, N) by unit; int8 has a scale per output, since the few large outputs would coarsen every unit."""
        if self.weights != "int8":
            self._keep("down", weight.t(), bias)
            return
        kept = int8_rows(weight)
        self.register_buffer("down_values", kept.values.t().contiguous())
        self.register_buffer("down_scales", torch.ones(weight.shape[1]))
        self.register_buffer("down_bias", None)
        self.register_buffer("out_scales", kept.scales)
        self.register_buffer("out_bias", None if bias is None else bias.detach().float().clone())

    def _decided(self) -> Decode:
        scale = cast(Tensor, self._buffers["scale"])
        up = self._rows("up") if self.gated else None
        near = [self._rows(name) if self.preview and (name == "near_first" or self.gated) else None
                for name in ("near_first", "near_up")]  # fmt: skip
        return decode_ffn(
            Decided(
                first=self._rows("first"),
                first_bias=self._buffers["first_bias"],
                third=up,
                third_bias=self._buffers["up_bias"] if self.gated else None,
                down=self._rows("down"),
                down_bias=self._buffers["down_bias"],
                activation=self.activation,
                scale=scale,
                norm=scale,
                limits=cast(Tensor, self._buffers["limits"]),
                near_first=cast(Int8Rows | None, near[0]),
                near_third=cast(Int8Rows | None, near[1]),
            )
        )

    def _value(self, x: Tensor) -> Tensor:
        """Return y."""
        own = x.float()
        out = self._decode(self._decided)(own) if self.alone else self._of(own)
        if self.weights == "int8":
            out = out.mul_(cast(Tensor, self._buffers["out_scales"]))
            bias = self._buffers["out_bias"]
            out = out if bias is None else out.add_(bias)
        return out.to(x.dtype)

    def _of(self, own: Tensor) -> Tensor:
        """Return y, of int8 rows before scale and bias, where it takes more than one kernel."""
        if isinstance(self.gater, SelfGater):
            return self._by_itself(own)
        logits = self._shifted(self.gater(own))
        gate = torch.gt(logits, self._limit, out=torch.empty_like(logits))
        bias, down_bias = self._buffers["first_bias"], self._buffers["down_bias"]
        third, third_bias = (self._rows("up"), self._buffers["up_bias"]) if self.gated else (None, None)
        if self.activation in FUSED:
            args = (gate, self.activation, self._rows("down"), down_bias)
            return narrow_ffn(own, self._rows("first"), bias, *args, w3=third, b3=third_bias)
        # Closed units are zero, and every known activation leaves them so.
        hidden = ACTIVATIONS[self.activation](narrow_linear(own, self._rows("first"), bias, gate))
        return self._rest(own, hidden)

    def _by_itself(self, x: Tensor) -> Tensor:
        """Return y where controllers shift what decides, or the activation is none that the kernels know."""
        every = x.new_ones((*x.shape[:-1], 1))
        first = ACTIVATIONS[self.activation](narrow_linear(x, self._rows("first"), self._buffers["first_bias"], every))
        if isinstance(self.gater, PreviewGater) and self.gated:
            first = first * narrow_linear(x, self._rows("up"), self._buffers["up_bias"], every)
            hidden = first * (self._shifted(first.abs() * self.gater.scale) > self._limit)
            return narrow_input_linear(hidden, self._rows("down"), self._buffers["down_bias"])
        return self._rest(x, first * (self._shifted(first.abs() * self.gater.scale) > self._limit))

    @property
    def _limit(self) -> Tensor:
        return cast(Tensor, self._buffers["limit"])

    def _shifted(self, logits: Tensor) -> Tensor:
        for control in self.sparsity:
            logits = control.shift(logits)  # type: ignore[operator]
        return logits

    def _rest(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Return W2 (hidden ∘ (W1 x + b1)) + b2, or W2 hidden + b2, reading rows where hidden is not zero."""
        down, bias = self._rows("down"), self._buffers["down_bias"]
        if self.gated:
            return narrow_ffn(x, self._rows("up"), self._buffers["up_bias"], hidden, "identity", down, bias)
        return narrow_input_linear(hidden, down, bias)

    def extra_repr(self) -> str:
        """Show how weights are kept."""
        return f"weights={self.weights!r}, activation={self.activation!r}, gated={self.gated}"


def _in_float32(gater: Any) -> Any:
    """Return the gater, or where it was cast with its model a copy in float32."""
    numbers = [each.dtype for each in (*gater.parameters(), *gater.buffers()) if each.is_floating_point()]
    return gater if all(dtype is torch.float32 for dtype in numbers) else copy.deepcopy(gater).float()


def all_open(owner: nn.Module, block: Block) -> BlockGating:
    """Return a gating for a dense block that leaves all units open; it is not put into the block."""
    up, down = affine_at(owner, block.up).weight, affine_at(owner, block.down).weight
    flops = 2 * ((2 if block.glu else 1) * up.shape[1] + down.shape[0])
    gating = Options(0.5, 1, "straight_through", 1, "self").gating(up.shape[1], up.shape[0], flops)
    gating.block = block
    gating.unit.threshold.fill_(NEVER)
    return gating


def keep_rows(model: nn.Module, weights: str = "int8", rest: bool = False) -> nn.Module:
    """Replace a model's converted blocks, in place, by ones for inference that keep their weights in few bytes.

    For decoding one token at a time on a CPU. There is no way back: save the model before.

    Args:
        model: converted and calibrated. Blocks that are modules of their own (Llama's, GPT-2's, T5's) are replaced.
        weights: ``"float32"``, ``"bf16"`` or ``"int8"`` (a scale per row).
        rest: also replace the other linear maps and dense blocks, with all of their units open: blocks that were not
            converted, attention's maps, and the map into the vocabulary (which then no longer shares its weight with
            the embedding). Their bytes count like those of the converted blocks, and for one token the kernels read
            faster than the products of PyTorch.

    Returns:
        the same model, in ``eval()``.

    Raises:
        ValueError: for a model without anything to replace, without thresholds, on another device than the CPU; for a
            converted block one of whose maps is more than weight and bias (an adapter, hooks).

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
    chosen.pop("gating", None)  # the model itself cannot be replaced in place
    made: dict[str, nn.Module] = {
        name.removesuffix(".gating"): RowsFFN(owner, gating, weights) for name, (owner, gating) in chosen.items()
    }
    kept = [name for name, module in model.named_modules() if isinstance(module, _Rows)]
    if rest:
        made |= _open_rows(model, weights, (*made, *blocks(model), *kept))
    if not made:
        done = "; its blocks were replaced already" if kept else ""
        raise ValueError(f"model: holds no converted block that is a module of its own{done}")
    return _put(model, made)


def _open_rows(model: nn.Module, weights: str, inside: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return the replacements of dense blocks and linear maps on the CPU, except for those given and their parts."""
    made: dict[str, nn.Module] = {}
    paths = [(owner, path) for owner, gating in blocks(model).values() for path in gating.block.maps]
    theirs = {id(at(owner, path)) for owner, path in paths}
    for name, module in model.named_modules():
        if not name or any(f"{name}.".startswith(f"{each}.") for each in (*inside, *made)):
            continue
        first = next(module.parameters(), None)
        if first is None or first.device.type != "cpu" or id(module) in theirs:
            continue
        found = [block for *_, block in find(name, module) if isinstance(block, Block) and block.kind == "module"]
        part = part_of(module) if isinstance(module, nn.Linear) else None
        if isinstance(part, Affine):
            made[name] = RowsLinear(part, weights)
        elif found and not any(each.startswith(f"{name}.") for each in inside) and _is_plain(module):
            made[name] = RowsFFN(module, all_open(module, found[0]), weights)
    return made


def _is_plain(block: nn.Module) -> bool:
    """Whether a block's maps have a weight and a bias and nothing else."""
    return all(isinstance(part_of(each), Affine) for each in block.children() if any(True for _ in each.parameters()))


def skip_inputs(
    model: nn.Module,
    loader: Iterable[Any],
    rate: float,
    weights: str = "float32",
    where: Callable[[str], bool] = lambda name: True,
    rest: bool = False,
) -> nn.Module:
    """Replace a model's linear maps, in place, by ones that read only the columns of large inputs (TEAL).

    Every map gets the threshold above which the share ``rate`` of its inputs' absolute values lies, over the loader's
    tokens in the dense model. For decoding one token at a time on a CPU; there is no way back.

    Args:
        model: on the CPU; no module in it is converted, but blocks may have been replaced by :func:`keep_rows`.
        loader: yields batches, as for :func:`gatelet.sparsity.calibrate_thresholds`.
        rate: the share of inputs to read.
        weights: ``"float32"``, ``"bf16"`` or ``"int8"``.
        where: which maps, by name.
        rest: keep the rows of the other linear maps, all of them open, as :func:`keep_rows` does.

    Returns:
        the same model, in ``eval()``.

    Raises:
        ValueError: for a model without such maps, or with converted blocks; a rate outside (0, 1).

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    >>> skip_inputs(model, [torch.randn(100, 8)], 0.4, where=lambda name: name == "0")[0].weights
    'float32'

    Reference: J. Liu, P. Ponnusamy, T. Cai, H. Guo, Y. Kim, B. Athiwaratkun, "Training-Free Activation Sparsity in
    Large Language Models", 2024, arXiv:2408.14690.
    """
    check_choice(weights, KEPT, "weights")
    check_rate(rate, "rate")
    if blocks(model):
        raise ValueError("model: holds converted blocks; keep_rows or revert them first")
    kept = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, _Rows))
    parts = {
        name: part_of(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(kept)  # a gater's own
    }
    chosen = {name: part for name, part in parts.items() if isinstance(part, Affine) and where(name)}
    if not chosen:
        raise ValueError("model: has no linear map that could be replaced")
    seen: dict[str, list[Tensor]] = {name: [] for name in chosen}

    def see(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            flat = args[0].detach().abs().flatten()
            seen[name].append(flat[:: flat.numel() // SAMPLE + 1 | 1].clone())

        return note

    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in chosen]
    model.eval()
    try:
        with torch.no_grad():
            for batch in loader:
                run_on(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name, sizes in seen.items() if not sizes]
    if missing:
        raise ValueError(f"loader: no batch reaches {missing[0]}")
    limits = {name: _exceeded(torch.cat(sizes), rate) for name, sizes in seen.items()}
    made: dict[str, nn.Module] = {name: InputRows(part, limits[name], weights) for name, part in chosen.items()}
    if rest:
        made |= _open_rows(model, weights, (*made, *(name.removesuffix(".") for name in kept)))
    return _put(model, made)


def _exceeded(sizes: Tensor, rate: float) -> float:
    """Return the number that this share of the sizes exceeds (``quantile`` takes at most 2²⁴ of them)."""
    return float(sizes.kthvalue(min(max(round((1 - rate) * len(sizes)), 1), len(sizes))).values)


def _put(model: nn.Module, made: dict[str, nn.Module]) -> nn.Module:
    for name, module in made.items():
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, module)
    _lay_together(made.values())
    if is_hugging_face(model):
        model.__dict__["save_pretrained"] = _refuse_to_save
    return model.eval()


def _refuse_to_save(*args: Any, **named: Any) -> None:
    """Say why a model is not written: what is read again would be a model of random weights."""
    raise ValueError(f"model: cannot be saved, because {REPLACED}; save it before")


@torch.no_grad()
def _lay_together(modules: Iterable[nn.Module]) -> None:
    """Move the weights into one piece of memory, in large pages if the system has them, where rows are found faster."""
    places = [
        (part, name, value)
        for module in modules
        for part in module.modules()
        if isinstance(part, _Rows)
        for name, value in part._buffers.items()
        if value is not None and value.dim() == 2
    ]
    sizes = [-(-value.nbytes // ALIGNED) * ALIGNED for _, _, value in places]
    memory, begin = large_empty(torch.empty(0, dtype=torch.uint8), (sum(sizes) + ALIGNED,)), 0
    for (part, name, value), size in zip(places, sizes, strict=True):
        part._buffers[name] = memory[begin : begin + value.nbytes].view(value.dtype).view(value.shape).copy_(value)
        begin += size
