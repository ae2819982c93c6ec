"""Conditional feed-forward blocks put into an existing model, and taken out again."""

import copy
import fnmatch
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gatelet._checks import check_count, check_rate
from gatelet.estimators import Estimator
from gatelet.nn.conditional_ffn import ACTIVATIONS, Affine, by_unit, check_saves, feed_forward, hidden_layer
from gatelet.nn.gating import Gating

Where = str | Iterable[str] | Callable[[str, nn.Module], bool]
Kind = Literal["module", "transformer", "bert", "sequential"]
METHOD = {"module": "forward", "transformer": "_ff_block", "bert": "feed_forward_chunk", "sequential": "forward"}
"""The method of a block's owner that computes it."""
CONVERTED = "already converted: revert it first"
KNOWN = f"known: {', '.join(ACTIVATIONS)}"
NATIVE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Block:
    """Where the parts of a feed-forward block lie in the module that owns it, by attribute path.

    Args:
        kind: whose computation is replaced (``METHOD``).
        up, down, glu: the affine maps W1, W2 and, gated, W_g.
        activation: a name of ``ACTIVATIONS``.
        inner: the dropout of the hidden layer.
        outer: the dropout of the output.
        last: in a Sequential, the name of the block's last module, W2.
    """

    kind: Kind
    up: str
    down: str
    activation: str
    glu: str | None = None
    inner: str | None = None
    outer: str | None = None
    last: str | None = None


class BlockGating(Gating):
    """The gating of a converted block; knows where its weights lie."""

    block: Block

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A state_dict of the dense model knows nothing of gaters: they stay as they are. What is put here is seen by
        # the submodules, which load from the same dictionary next.
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update({prefix + key: value for key, value in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


# -------------------------------------------------------------------- the computation of a converted block


def _at(owner: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(owner) if "." in path else owner._modules[path]


def _affine(module: nn.Module) -> Affine:
    """Return weight (N, D) and bias of a Linear, or of a Conv1D, which keeps its weight transposed."""
    weight = cast(Tensor, module.weight)
    return Affine(weight.t() if hasattr(module, "nf") else weight, cast(Tensor | None, module.bias))


def affine_at(owner: nn.Module, path: str) -> Affine:
    """Return weight (N, D) and bias of the affine map at this path."""
    return _affine(_at(owner, path))


def _rate(owner: nn.Module, path: str | None) -> float:
    dropout = None if path is None else _at(owner, path)
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def run_block(owner: nn.Module, gating: BlockGating, x: Tensor) -> Tensor:
    """Return W2 (hidden ∘ h) + b2 of the owner's block, before any dropout of the output."""
    block = gating.block
    glu = None if block.glu is None else affine_at(owner, block.glu)
    up, down = affine_at(owner, block.up), affine_at(owner, block.down)
    return feed_forward(x, gating, block.activation, up, down, glu, _rate(owner, block.inner))


def _run(owner: nn.Module, x: Tensor) -> Tensor:
    gating = cast(BlockGating, owner._modules["gating"])
    out = run_block(owner, gating, x)
    if gating.block.outer is not None:
        out = _at(owner, gating.block.outer)(out)
    return out


class _Swapped(nn.Module):
    """Marks the classes that :func:`convert` gives to blocks' owners."""

    dense_class: type[nn.Module]
    kind: Kind

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.dense_class, self.kind), self.__getstate__()


def _rebuild(dense_class: type[nn.Module], kind: Kind) -> nn.Module:
    cls = swapped(dense_class, kind)
    return cls.__new__(cls)


_CLASSES: dict[tuple[type[nn.Module], Kind], type[nn.Module]] = {}


def swapped(dense_class: type[nn.Module], kind: Kind) -> type[nn.Module]:
    """Return a subclass that computes the block conditionally; all else, state included, is the class's."""
    if (dense_class, kind) not in _CLASSES:
        _CLASSES[dense_class, kind] = _subclass(dense_class, kind)
    return _CLASSES[dense_class, kind]


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
            gating = cast(nn.Module, module)._modules.get("gating")
            if isinstance(gating, BlockGating) and gating.block.kind == "sequential":
                x, until = run_block(self, gating, x), gating.block.last
            else:
                x = cast(nn.Module, module)(x)
        return x

    methods = {"bert": compute_bert, "sequential": compute_sequential}
    body: dict[str, Any] = {METHOD[kind]: methods.get(kind, compute), "dense_class": dense_class, "kind": kind}
    if kind == "transformer":
        # torch fuses the whole layer in eval() where it can; that path knows nothing of gates.
        body["activation_relu_or_gelu"] = property(lambda self: 0, lambda self, value: None)
    return type(f"Conditional{dense_class.__name__}", (_Swapped, dense_class), body)


# -------------------------------------------------------------------- finding blocks


def is_affine(module: Any) -> bool:
    """Whether this is a Linear, or a Conv1D as GPT-2 has it, that nothing was built upon."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    weight = getattr(module, "weight", None)
    return hasattr(module, "nf") and hasattr(module, "nx") and isinstance(weight, Tensor) and weight.dim() == 2


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return N and D of an affine map."""
    units, width = _affine(module).weight.shape
    return units, width


def which_activation(function: Callable[[Tensor], Any]) -> str | None:
    """Return the name of the activation that a function or module computes, None if it is none that is known."""
    grid = torch.linspace(-6, 6, 241)
    try:
        with torch.no_grad():
            found = function(grid.clone())
    except Exception:  # whatever it is, it is not an activation
        return None
    if not isinstance(found, Tensor) or found.shape != grid.shape:
        return None
    fits = (name for name, act in ACTIVATIONS.items() if torch.allclose(found, act(grid), rtol=0, atol=2e-6))
    return next(fits, None)


def _elementwise(module: nn.Module) -> bool:
    return not any(True for _ in module.parameters()) and not any(True for _ in module.children())


def _find(name: str, module: nn.Module) -> list[tuple[str, nn.Module, Block | str]]:
    """Return the blocks that this module owns: name, the module that gets the gating, and the block or why not."""
    dense_class = module.dense_class if isinstance(module, _Swapped) else type(module)
    if isinstance(module, nn.Sequential):
        return list(_sequential(name, module)) if dense_class.forward is nn.Sequential.forward else []
    if isinstance(module, _Swapped):
        return [(name, module, CONVERTED)]
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        own = (
            nn.TransformerEncoderLayer if isinstance(module, nn.TransformerEncoderLayer) else nn.TransformerDecoderLayer
        )
        activation = which_activation(module.activation)
        if type(module)._ff_block is not own._ff_block:
            return [(name, module, "its class computes the feed-forward block in its own way")]
        if activation is None:
            return [(name, module, f"its activation {module.activation} is unknown ({KNOWN})")]
        outer = "dropout2" if own is nn.TransformerEncoderLayer else "dropout3"
        return [(name, module, Block("transformer", "linear1", "linear2", activation, None, "dropout", outer))]
    if hasattr(module, "feed_forward_chunk") and hasattr(module, "intermediate") and hasattr(module, "output"):
        return [(name, module, _bert(cast(Any, module)))]
    affine = {key: child for key, child in module.named_children() if is_affine(child)}
    if len(affine) not in (2, 3):
        return []
    found = _by_structure(module, affine)
    return [] if found is None else [(name, module, found)]


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Set the module to ``eval()``, without gradients, inside the block."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad():
            module.eval()
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _bert(module: Any) -> Block | str:
    first, last = getattr(module.intermediate, "dense", None), getattr(module.output, "dense", None)
    norm = getattr(module.output, "LayerNorm", None)
    if not (is_affine(first) and is_affine(last) and norm is not None):
        return "its feed-forward block is not made of intermediate.dense, output.dense and output.LayerNorm"
    activation = which_activation(getattr(module.intermediate, "intermediate_act_fn", lambda x: None))
    if activation is None:
        return f"its activation intermediate.intermediate_act_fn is unknown ({KNOWN})"
    first, last = _affine(cast(nn.Module, first)), _affine(cast(nn.Module, last))
    x = torch.randn(1, 3, first.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(last.weight)
    with _evaluated(module):
        try:
            have = module.feed_forward_chunk(x)
        except Exception as error:
            return f"its feed_forward_chunk does not take one tensor ({type(error).__name__}: {error})"
        want = norm(nn.functional.linear(hidden_layer(x, activation, first, None), *last) + x)
        same = torch.allclose(have, want, rtol=1e-4, atol=1e-5 if x.dtype in NATIVE else 5e-2)
    if not same:
        return "its feed_forward_chunk is not LayerNorm(W2 act(W1 x + b1) + b2 + x)"
    outer = "output.dropout" if isinstance(getattr(module.output, "dropout", None), nn.Dropout) else None
    return Block("bert", "intermediate.dense", "output.dense", activation, None, None, outer)


def _sequential(name: str, module: nn.Sequential) -> Iterator[tuple[str, nn.Module, Block | str]]:
    items, start = list(module._modules.items()), 0
    while start + 2 < len(items):
        (first_name, first), (_, act), *rest = items[start:]
        inner = rest[0][0] if isinstance(rest[0][1], nn.Dropout) else None
        last_name, last = rest[1] if inner is not None and len(rest) > 1 else rest[0]
        start += 1
        if not (is_affine(first) and is_affine(last) and act is not None and _elementwise(act)):
            continue
        activation = which_activation(act)
        label = _join(name, first_name)
        if "gating" in first._modules:
            yield label, first, CONVERTED
        elif isinstance(act, nn.Dropout | nn.Identity):
            continue
        elif activation is None:
            yield label, first, f"its activation {act} is unknown ({KNOWN})"
        elif _shape(first)[0] != _shape(last)[1]:
            yield label, first, "W1 and W2 do not fit together"
        else:
            block = Block("sequential", first_name, last_name, activation, None, inner, None, last_name)
            yield label, first, block
        # W2 is not the next block's W1.
        start = next(at for at, (key, _) in enumerate(items) if key == last_name) + 1


def _by_structure(module: nn.Module, affine: dict[str, nn.Module]) -> Block | str | None:
    """Recognise an MLP module by trying what it computes; None for what does not even look like one."""
    shapes = {key: _shape(child) for key, child in affine.items()}
    downs = []
    for key, (_, hidden) in shapes.items():
        others = [shapes[other] for other in affine if other != key]
        if all(other == (hidden, others[0][1]) for other in others) and hidden > others[0][1]:
            downs.append(key)
    others_known = all(is_affine(child) or _elementwise(child) for child in module.children())
    if not others_known or any(True for _ in module.parameters(recurse=False)):
        return None
    if not downs:
        (wide, width), (out, hidden) = sorted(shapes.values(), reverse=True)[:2]
        fused = len(shapes) == 2 and wide == 2 * hidden and out == width
        shape = f"W1 {width} → {wide} and W2 {hidden} → {out} are of no known shape"
        return f"{shape} (W1 and W_g in one matrix, it seems: they need one each)" if fused else None
    reason = f"its forward computes neither W2 act(W1 x + b1) + b2 nor the gated form, by an activation that is {KNOWN}"
    for down in downs:
        ups = [key for key in affine if key != down]
        pairs = [(ups[0], None)] if len(ups) == 1 else [(ups[0], ups[1]), (ups[1], ups[0])]
        for up, glu in pairs:
            found = _probe(module, up, down, glu)
            if isinstance(found, Block):
                return found
            reason = found or reason
    return reason


def _probe(module: nn.Module, up: str, down: str, glu: str | None) -> Block | str | None:
    """Return the block if the module computes one, whatever its code looks like; a reason if it cannot be tried."""
    first, last = affine_at(module, up), affine_at(module, down)
    gate = None if glu is None else affine_at(module, glu)
    if first.weight.is_meta:
        return "its weights are on the meta device"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, first.weight.shape[1], generator=generator).to(first.weight)
    seen: dict[str, Tensor] = {}
    drops = {key: child for key, child in module.named_children() if isinstance(child, nn.Dropout)}
    hooks = [
        child.register_forward_hook(lambda _, args, __, key=key: seen.update({key: args[0]}))
        for key, child in drops.items()
    ]
    try:
        with _evaluated(module):
            probe = nn.functional.linear(x, *(first if gate is None else gate))
            x = x * (2 / probe.std().clamp_min(1e-6)).to(x)  # where activations differ
            have = module(x)
            for name in ACTIVATIONS:
                hidden = hidden_layer(x, name, first, gate)
                want = nn.functional.linear(hidden, *last)
                if not isinstance(have, Tensor) or have.shape != want.shape:
                    return None
                exact = x.dtype in NATIVE
                if not torch.allclose(have, want, rtol=0, atol=float(want.abs().max()) * (2e-6 if exact else 2e-2)):
                    continue
                if not exact:  # too coarse to tell two forms of gelu apart
                    name = next((n for n in map(which_activation, module.children()) if n is not None), name)
                inner = next((key for key, at in seen.items() if at.shape == hidden.shape and at is not have), None)
                outer = next((key for key, at in seen.items() if key != inner), None)
                return Block("module", up, down, name, glu, inner, outer)
    except Exception as error:
        return f"its forward does not take one tensor ({type(error).__name__}: {error})"
    finally:
        for hook in hooks:
            hook.remove()
    return None


# -------------------------------------------------------------------- convert and revert


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did; it prints as a list."""

    converted: dict[str, str] = field(default_factory=dict)
    """Block's name -> what it is."""
    left: dict[str, str] = field(default_factory=dict)
    """Block's name -> why it was left dense."""

    def __repr__(self) -> str:
        """Show both lists."""
        lines = [f"converted {len(self.converted)}, left {len(self.left)}"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.converted.items()]
        lines += [f"  {name or '(the model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def convert(
    model: nn.Module,
    target_rate: float = 0.1,
    bottleneck: int = 64,
    where: Where | None = None,
    estimator: str | Estimator = "straight_through",
    group_size: int = 1,
    **options: Any,
) -> Conversion:
    """Give a model's feed-forward blocks gates, in place; its weights stay the parameters they are.

    Every block W2 act(W1 x + b1) + b2 becomes W2 (act(W1 x + b1) ∘ h) + b2, gated blocks likewise, h = gate(gater(x)).
    Found are: ``Linear, activation, Linear`` in a Sequential, with dropout behind the activation or without; modules
    that compute such a block, whatever they are called, the MLPs of GPT-2 and Llama among them (they are recognised by
    trying them on an input); ``nn.TransformerEncoderLayer`` and ``DecoderLayer``; layers built as BERT's.

    The blocks' owners change their class to a subclass and get a submodule ``gating`` (in a Sequential, the first
    Linear gets it), so that a ``state_dict`` of the dense model loads; names, values, dtype and device of weights are
    as before. In memory W2 is laid out by hidden unit. The gaters are new: next comes :func:`gatelet.distil`.

    Args:
        model: changed in place.
        target_rate: the share of gates to be open.
        bottleneck: M, the width of the gaters' hidden layer.
        where: which blocks: a name or pattern (``"*.layer.3*"``), several, or a predicate of name and module. All
            that are found by default.
        estimator: a name of ``gatelet.estimators.ALL`` or an instance, of which every block gets a copy.
        group_size: consecutive units that share a gate.
        options: further ones of :class:`gatelet.nn.ConditionalFFN`: ``sparsity``, ``detach_gater_input``.

    Returns:
        what was converted, what was left and why; print it.

    Raises:
        ValueError: if nothing was converted, with the reasons: blocks of unknown shape, a bottleneck that saves
            nothing, weights in half precision on a CPU, tied weights, blocks already converted, or a ``where`` that
            names no block.

    >>> import torch, gatelet
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    >>> gatelet.convert(model, target_rate=0.25, bottleneck=8)
    converted 1, left 0
      0: 64 → 256 → 64, gelu
    >>> _ = gatelet.revert(model)
    """
    check_rate(target_rate)
    check_count(bottleneck, "bottleneck")
    check_count(group_size, "group_size")
    report, chosen = Conversion(), _chooser(where)
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    gating_parts = {id(part) for each in model.modules() if isinstance(each, Gating) for part in each.modules()}
    candidates = [
        (label, module, holder, block)
        for name, module in model.named_modules()
        if id(module) not in gating_parts  # a gater looks like a block, too
        for label, holder, block in _find(name, module)
    ]
    seen = 0
    for name, owner, holder, block in candidates:
        if not chosen(name, owner):
            continue
        seen += 1
        reason = (
            block if isinstance(block, str) else _why_not(owner, block, target_rate, bottleneck, group_size, owners)
        )
        if reason is not None:
            report.left[name] = reason
            continue
        assert isinstance(block, Block)
        up, down = affine_at(owner, block.up), affine_at(owner, block.down)
        flops = 2 * ((2 if block.glu else 1) * up.weight.shape[1] + down.weight.shape[0])
        sizes = (up.weight.shape[1], up.weight.shape[0], bottleneck, flops)
        gating = BlockGating(*sizes, copy.deepcopy(estimator), target_rate, group_size, **options)
        gating.block = block
        gating.to(up.weight).train(owner.training)
        for path in (block.up, block.down, block.glu):
            if path is not None:
                affine = _at(owner, path)
                transposed = hasattr(affine, "nf")
                by_unit(affine.weight, int((path == block.down) != transposed))
        holder.add_module("gating", gating)
        if not isinstance(owner, _Swapped):
            owner.__class__ = swapped(type(owner), block.kind)
        gated = "gated " if block.glu else ""
        sizes_shown = " → ".join(map(str, (up.weight.shape[1], up.weight.shape[0], down.weight.shape[0])))
        report.converted[name] = f"{sizes_shown}, {gated}{block.activation}"
    if not report.converted:
        if not seen:
            names = [name or "(the model)" for name, *_ in candidates]
            known = f" ({len(names)} blocks were found: {', '.join(names[:8])})" if names else ""
            raise ValueError(f"{'where: selects' if names else 'model: has'} no feed-forward block{known}")
        raise ValueError(f"model: no feed-forward block could be converted\n{report!r}")
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, _Swapped) for m in module.layers):
            # Its fused path hands the layers nested tensors, which no kernel reads.
            if not hasattr(module, "_dense_use_nested_tensor"):
                module._dense_use_nested_tensor = module.use_nested_tensor  # type: ignore[assignment]
            module.use_nested_tensor = False
    return report


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _why_not(
    owner: nn.Module, block: Block, target_rate: float, bottleneck: int, group_size: int, uses: dict[int, int]
) -> str | None:
    """Return why this block is to be left dense, None if it can be converted."""
    up, down = affine_at(owner, block.up), affine_at(owner, block.down)
    units, width = up.weight.shape
    paths = [path for path in (block.up, block.down, block.glu) if path is not None]
    tied = [path for path in paths if uses[id(_at(owner, path).weight)] > 1]
    if tied:
        return f"its {tied[0]}.weight is tied: what is fitted here would change it in its other place"
    if up.weight.device.type == "cpu" and up.weight.dtype not in NATIVE:
        return (
            f"its weights are {up.weight.dtype} on the CPU, where closed units are skipped in float32 and float64 "
            "only; model.float() first"
        )
    if units % group_size:
        return f"group_size {group_size} does not divide its {units} units"
    try:
        check_saves(width, down.weight.shape[0], units, bottleneck, group_size, target_rate, block.glu is not None)
    except ValueError as error:
        return str(error)
    return None


def _chooser(where: Where | None) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda name, module: True
    if callable(where):
        return where
    patterns = [where] if isinstance(where, str) else list(where)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError("where must be a name or pattern, several of them, or a predicate of name and module")
    return lambda name, module: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def blocks(model: nn.Module) -> dict[str, tuple[nn.Module, BlockGating]]:
    """Return owner and gating of every converted block, by the name of its gating."""
    found: dict[str, tuple[nn.Module, BlockGating]] = {}
    for name, module in model.named_modules():
        if isinstance(module, _Swapped):
            holders = module.named_children() if isinstance(module, nn.Sequential) else [("", module)]
            for key, holder in holders:
                gating = holder._modules.get("gating")
                if isinstance(gating, BlockGating):
                    found[".".join(part for part in (name, key, "gating") if part)] = (module, gating)
    return found


def revert(model: nn.Module) -> nn.Module:
    """Take the gates out of a converted model, in place: the dense model, with the weights that it has now.

    Args:
        model: what :func:`convert` changed.

    Returns:
        the same model.

    Raises:
        ValueError: if it holds no converted block.

    >>> import torch, gatelet
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    >>> _ = gatelet.convert(model, bottleneck=8)
    >>> gatelet.revert(model)
    Sequential(
      (0): Linear(in_features=64, out_features=256, bias=True)
      (1): GELU(approximate='none')
      (2): Linear(in_features=256, out_features=64, bias=True)
    )
    """
    found = blocks(model)
    if not found:
        raise ValueError("model: holds no converted block")
    for owner, gating in found.values():
        for path in (gating.block.up, gating.block.down, gating.block.glu):
            if path is not None:
                weight = cast(nn.Parameter, _at(owner, path).weight)
                weight.data = weight.data.contiguous()
        holder = _at(owner, gating.block.up) if gating.block.kind == "sequential" else owner
        del holder._modules["gating"]
    for owner in {id(owner): owner for owner, _ in found.values()}.values():
        owner.__class__ = cast(_Swapped, owner).dense_class
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, "_dense_use_nested_tensor"):
            module.use_nested_tensor = cast(bool, module._dense_use_nested_tensor)
            del module._dense_use_nested_tensor
    return model
