"""Conditional feed-forward blocks put into an existing model, and taken out again."""

import copy
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from gatelet._checks import check_count, check_rate
from gatelet.convert.block import METHOD, NATIVE, Block, BlockGating, Options, affine_at, at, holder_in
from gatelet.convert.block_times import BlockTimes, time_block
from gatelet.convert.describe import note
from gatelet.convert.find import find
from gatelet.convert.place import blocks, put, why_no_block, without_nested_tensors
from gatelet.convert.report import others_of
from gatelet.convert.run import Swapped
from gatelet.estimators import Estimator, resolve
from gatelet.nn.conditional_layer import ConditionalLayer
from gatelet.nn.gaters import GaterError
from gatelet.nn.parts import was_replaced

Where = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did; it prints as a list."""

    converted: dict[str, str] = field(default_factory=dict)
    """Block's name -> what it is."""
    left: dict[str, str] = field(default_factory=dict)
    """Block's name -> why it was left dense."""
    times: dict[str, BlockTimes] = field(default_factory=dict)
    """Block's name -> its times, if ``batch`` was given."""

    def __repr__(self) -> str:
        """Show both lists; neighbours that differ in the layer's number only share a line."""
        said = [
            (name, what + (f"; {self.times[name]}" if name in self.times else ""))
            for name, what in self.converted.items()
        ]
        said += [(name, f"left, {why}") for name, why in self.left.items()]
        lines = [f"converted {len(self.converted)}, left {len(self.left)}"]
        return "\n".join([*lines, *(f"  {name or '(the model)'}: {words}" for name, words in _grouped(said))])


def _grouped(said: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the pairs, with one, ``layers.0-2.mlp``, for neighbours that say the same of layers.0.mlp and so on."""
    groups: list[list[tuple[str, str]]] = []
    for name, words in said:
        if groups and words == groups[-1][0][1] and _counts_up([other for other, _ in groups[-1]], name):
            groups[-1].append((name, words))
        else:
            groups.append([(name, words)])
    found = []
    for group in groups:
        parts, last = (re.split(r"(\d+)", name) for name, _ in (group[0], group[-1]))
        pairs = zip(parts, last, strict=True)
        found.append(("".join(part if part == end else f"{part}-{end}" for part, end in pairs), group[0][1]))
    return found


def _counts_up(names: list[str], name: str) -> bool:
    """Return whether the name goes on counting where these end: the same but for one number, the next one."""
    first, previous, new = (re.split(r"(\d+)", each) for each in (names[0], names[-1], name))
    if len(new) != len(previous):
        return False
    places = [place for place, part in enumerate(new) if part != previous[place]]
    if len(places) != 1 or not places[0] % 2 or int(new[places[0]]) != int(previous[places[0]]) + 1:
        return False
    return len(names) == 1 or first[places[0]] != previous[places[0]]


def convert(
    model: nn.Module,
    target_rate: float | Mapping[str, float] = 0.1,
    bottleneck: int | None = None,
    where: Where | None = None,
    estimator: str | Estimator = "straight_through",
    group_size: int = 1,
    gater: str | nn.Module = "mlp",
    batch: int | None = None,
    **options: Any,
) -> Conversion:
    """Give a model's feed-forward blocks gates, in place; its weights stay the parameters they are.

    Every block W2 act(W1 x + b1) + b2 becomes W2 (act(W1 x + b1) ∘ h) + b2, gated blocks likewise, h = gate(gater(x)).
    It finds: ``Linear, activation, Linear`` in a Sequential, with or without dropout after the activation; modules of
    any name that compute such a block, such as the MLPs of GPT-2 and Llama (recognised by trying them on an input);
    ``nn.TransformerEncoderLayer`` and ``DecoderLayer``; layers built like BERT's.

    The blocks' owners change their class to a subclass and get a submodule ``gating`` (in a Sequential, the first
    Linear gets it), so that a ``state_dict`` of the dense model loads; names, values, dtype and device of weights are
    as before. The gaters are new: next comes :func:`gatelet.distil`. Pruning, a parametrization or hooks on one of the
    affine maps, there before or put on later, and an adapter (LoRA) put on later, are honoured by running that block
    densely.

    Args:
        model: changed in place.
        target_rate: the share of gates to be open; or block's name -> its share, as
            :func:`gatelet.convert.spread_rate` returns it, for all blocks that ``where`` chooses.
        bottleneck: M, the width of the gaters' hidden layer; 64 by default, and None where ``gater`` is a module.
        where: which blocks: a name or pattern (``"*.layer.3*"``), several, or a predicate of name and module. All
            that are found by default.
        estimator: a name of ``gatelet.estimators.ALL`` or an instance; every block gets a copy.
        group_size: consecutive units that share a gate.
        gater: ``"mlp"``, ``"two_stage"``, or a module that maps (..., D) to (..., N / group_size) logits, of which
            every block gets a copy (:class:`gatelet.nn.ConditionalLinear`); or ``"self"``: the block's own activation
            decides, by a threshold, and nothing has to be fitted; next comes
            :func:`gatelet.sparsity.calibrate_thresholds`, or ``distil``, which calibrates too
            (:class:`gatelet.nn.ConditionalFFN`); or ``"preview"``: what units add to the output decides, which pays
            once :func:`gatelet.convert.keep_rows` has replaced the blocks.
        batch: if given, time each block for this many tokens (once per shape and rate): with random gates beside dense
            and, where that is possible, as :func:`gatelet.convert.keep_rows` would make it, beside the same kernels
            with all units open. Other weights are read between two runs, as in the model. The list says where the
            gates save no time.
        options: further ones of :class:`gatelet.nn.ConditionalFFN`: ``sparsity``, ``detach_gater_input``.

    Returns:
        what was converted, what was left and why; print it.

    Raises:
        ValueError: if nothing was converted, with the reasons: blocks of unknown shape, a gater that saves nothing, a
            module whose own ``forward`` was replaced (as accelerate's hooks do), weights in half precision on a CPU,
            tied weights, blocks already converted, or a ``where`` that names no block.

    >>> import torch, gatelet
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    >>> gatelet.convert(model, target_rate=0.25, bottleneck=8)
    converted 1, left 0
      0: 64 → 256 → 64, gelu
    >>> _ = gatelet.revert(model)
    """
    for rate in target_rate.values() if isinstance(target_rate, Mapping) else [target_rate]:
        check_rate(rate)
    if bottleneck is None and isinstance(gater, str):
        bottleneck = 64
    if bottleneck is not None:
        check_count(bottleneck, "bottleneck")
    check_count(group_size, "group_size")
    if batch is not None:
        check_count(batch, "batch")
    report, chosen = Conversion(), _chooser(where)
    uses = _uses(model)
    candidates = _candidates(model)
    if isinstance(target_rate, Mapping):
        found = {name: isinstance(block, Block) and chosen(name, owner) for name, owner, _, block in candidates}
        _check_names(target_rate, found)
    seen, timed = 0, dict[tuple[str, float], BlockTimes]()
    for name, owner, holder, block in candidates:
        if not chosen(name, owner):
            continue
        seen += 1
        rate = target_rate.get(name, 0.5) if isinstance(target_rate, Mapping) else target_rate
        made = Options(rate, bottleneck, estimator, group_size, gater, options)
        reason = block if isinstance(block, str) else _why_not(owner, block, made, uses)
        if isinstance(block, str) or reason is not None:
            report.left[name] = str(reason)
            continue
        try:
            report.converted[name] = what = put(owner, holder, block, made)
        except GaterError as error:
            report.left[name] = str(error)
            continue
        if batch is not None:
            gating = cast(BlockGating, holder._modules["gating"])
            timed[what, rate] = timed.get((what, rate)) or time_block(owner, gating, batch, others_of(model))
            report.times[name] = timed[what, rate]
    if not report.converted:
        if not seen:
            names = [name or "(the model)" for name, *_ in candidates]
            known = f" ({len(names)} blocks were found: {', '.join(names[:8])})" if names else ""
            told = "where: selects" if names else "model: has"
            raise ValueError(f"{told} no feed-forward block{known}{_about_adapters(model)}")
        raise ValueError(f"model: no feed-forward block could be converted{_about_adapters(model)}\n{report!r}")
    without_nested_tensors(model)
    note(model)
    return report


def _about_adapters(model: nn.Module) -> str:
    """Return what to do about adapters, in which blocks are not found."""
    has = any(isinstance(module._modules.get("base_layer"), nn.Module) for module in model.modules())
    return "; it has adapters: merge them first, or convert the model before they are added" if has else ""


def _check_names(rates: Mapping[str, float], chosen: dict[str, bool]) -> None:
    """Raise unless there is a rate for every chosen block, and a block for every rate."""
    unknown = [name for name in rates if name not in chosen]
    if unknown:
        raise ValueError(f"target_rate: the model has no block {unknown[0]!r}; it has {', '.join(list(chosen)[:8])}")
    missing = [name for name, is_chosen in chosen.items() if is_chosen and name not in rates]
    if missing:
        raise ValueError(f"target_rate: has no rate for the block {missing[0]!r}")


def _uses(model: nn.Module) -> dict[int, int]:
    """Return in how many places each parameter is used, by its id."""
    found: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        found[id(parameter)] = found.get(id(parameter), 0) + 1
    return found


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module, Block | str]]:
    """Return the blocks: name, owner, the module that gets the gating, and the block or why it is none."""
    gating_parts = {
        id(part) for each in model.modules() if isinstance(each, ConditionalLayer) for part in each.modules()
    }
    return [
        (label, module, holder, block)
        for name, module in model.named_modules()
        if id(module) not in gating_parts  # a gater looks like a block, too
        for label, holder, block in find(name, module)
    ]


def _why_not(owner: nn.Module, block: Block, made: Options, uses: dict[int, int]) -> str | None:
    """Return why this block is to be left dense, None if it can be converted."""
    if was_replaced(owner, METHOD[block.kind]):
        hint = "; remove_hook_from_module of accelerate.hooks first, and add it again after convert"
        return f"its {METHOD[block.kind]} was replaced on this module, which would go on computing the dense block" + (
            hint if hasattr(owner, "_hf_hook") else "; convert before that is done"
        )
    up = affine_at(owner, block.up)
    units = up.weight.shape[0]
    tied = [path for path in block.maps if uses[id(at(owner, path).weight)] > 1]
    if tied:
        return f"its {tied[0]}.weight is tied: what is fitted here would change it in its other place"
    if up.weight.device.type == "cpu" and up.weight.dtype not in NATIVE:
        return (
            f"its weights are {up.weight.dtype} on the CPU, where closed units are skipped in float32 and float64 "
            "only; model.float() first"
        )
    if block.kind == "pair" and not resolve(copy.deepcopy(made.estimator)).binary:
        return "its activation comes after the gates, which must be 0 or 1 then; those of this estimator are not"
    if units % made.group_size:
        return f"group_size {made.group_size} does not divide its {units} units"
    return None


def _chooser(where: Where | None) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda name, module: True
    if callable(where):
        return where
    patterns = [where] if isinstance(where, str) or not isinstance(where, Iterable) else list(where)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError("where must be a name or pattern, several of them, or a predicate of name and module")
    return lambda name, module: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


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
        raise ValueError(why_no_block(model))
    for owner, gating in found.values():
        holder = holder_in(at(owner, gating.block.up)) if gating.block.kind == "sequential" else owner
        del cast(nn.Module, holder)._modules["gating"]
    for module in list(model.modules()):
        if isinstance(module, Swapped):
            cast(Any, module).__class__ = module.dense_class
            module.__dict__.pop("gating_of_pair", None)
            module.__dict__.pop("gated", None)
    note(model)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, "_dense_use_nested_tensor"):
            module.use_nested_tensor = cast(bool, module._dense_use_nested_tensor)
            del module._dense_use_nested_tensor
    return model
