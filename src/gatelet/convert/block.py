"""A feed-forward block of a model: where its parts are, and the gating that is put into it."""

import copy
import operator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from gatelet.estimators import Estimator
from gatelet.kernels import OpenPattern
from gatelet.nn.conditional_ffn import ACTIVATIONS
from gatelet.nn.conditional_layer import ConditionalLayer
from gatelet.nn.parts import Affine, Part, more_than_affine, part_of

Kind = Literal["module", "transformer", "bert", "sequential", "pair", "up", "down"]
METHOD = {
    "module": "forward",
    "transformer": "_ff_block",
    "bert": "feed_forward_chunk",
    "sequential": "forward",
    "pair": "forward",
    "up": "forward",
    "down": "forward",
}
"""The method of a block's owner that computes it."""
KNOWN = f"known: {', '.join(ACTIVATIONS)}"
NATIVE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Block:
    """Where the parts of a feed-forward block are in the module that owns it, by attribute path.

    Args:
        kind: what is replaced (``METHOD``); for a ``"pair"``, whose owner calls W1, the activation and W2 among other
            things, the two maps (``"up"``, ``"down"``).
        up, down, glu: the affine maps W1, W2 and, gated, W_g. Where W_g and W1 are one matrix, ``"path:0"`` is the half
            of its outputs that comes first and ``"path:1"`` the other.
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

    @property
    def maps(self) -> tuple[str, ...]:
        """The paths of its affine maps."""
        return tuple(path for path in (self.up, self.down, self.glu) if path is not None)


@dataclass(frozen=True)
class Options:
    """The options that a block was converted with: the arguments of :func:`gatelet.convert`."""

    target_rate: float
    bottleneck: int | None
    estimator: str | Estimator
    group_size: int
    gater: str | nn.Module
    further: dict[str, Any] = field(default_factory=dict)

    def gating(self, width: int, units: int, flops_per_unit: int) -> "BlockGating":
        """Return new gates for a block of these sizes."""
        estimator, gater, further = copy.deepcopy(
            (self.estimator, self.gater, self.further)
        )  # controllers have a state
        sizes = (width, units, self.bottleneck, flops_per_unit)
        made = BlockGating(*sizes, estimator, self.target_rate, self.group_size, gater=gater, **further)
        made.options = self
        return made


class Passed(NamedTuple):
    """What W1 of a pair decided: the gates, and their pattern if W2 is to read open units alone."""

    gates: Tensor
    pattern: OpenPattern | None


class BlockGating(ConditionalLayer):
    """The gating of a converted block. It records where the block's weights are and how it was made."""

    block: Block
    options: Options
    passed: dict[int, Passed]
    """For a pair: Python thread -> what W1's call leaves for W2's."""
    adapted: set[int]
    """For a pair: the Python threads in a call where W1 is part of an adapter."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.passed, self.adapted = {}, set()

    @property
    def has_glu(self) -> bool:
        """Whether the block has a W_g."""
        return self.block.glu is not None

    def _mask_of(self, x: Tensor) -> Tensor | None:
        """Return the mask of :func:`gatelet.nn.masking` for these tokens, also where a pair's owner flattens them."""
        mask = self.mask
        if mask is None or self.block.kind != "pair" or mask.dim() != 2 or x.dim() != 2 or not len(mask):
            return super()._mask_of(x)
        rows, most = mask.shape
        each, left = divmod(len(x), rows)
        self.mask_met = self.mask_met or (each == most and not left)
        if left or not self.mask_met:
            return super()._mask_of(x)  # which says what is wrong
        if each < most:  # tokens that generate() adds
            return None
        return torch.cat([mask.bool(), mask.new_ones((rows, each - most), dtype=torch.bool)], dim=1).flatten()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A state_dict of the dense model knows nothing of gaters: they stay as they are. What is put here is seen by
        # the submodules, which load from the same dictionary next.
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update({prefix + key: value for key, value in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def module_path(path: str) -> str:
    """Return the attribute path of a map's module, without the half that the map is of it."""
    return path.partition(":")[0]


class _Half(nn.Module):
    """One half of a module's output, for a module (``whole``) that must be called."""

    def __init__(self, whole: nn.Module, place: int) -> None:
        super().__init__()
        self.whole, self.place = whole, place

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.whole(x).chunk(2, dim=-1)[self.place])


def _half_of(part: Part, path: str) -> Part:
    """Return the half that the path names, or the whole."""
    half = path.partition(":")[2]
    if not half:
        return part
    if not isinstance(part, Affine):
        return _Half(part, int(half))
    weight, bias = part
    return Affine(weight.chunk(2)[int(half)], None if bias is None else bias.chunk(2)[int(half)])


def at(owner: nn.Module, path: str) -> Any:
    """Return the submodule at this attribute path; for a half, the whole."""
    path = module_path(path)
    return operator.attrgetter(path)(owner) if "." in path else owner._modules[path]


def affine_of(module: nn.Module) -> Affine:
    """Return weight (N, D) and bias of a Linear, or of a Conv1D, which keeps its weight transposed.

    For its sizes. What it computes is :func:`part_of`'s.
    """
    weight = cast(Tensor, module.weight)
    return Affine(weight.t() if hasattr(module, "nf") else weight, cast(Tensor | None, module.bias))


def affine_at(owner: nn.Module, path: str) -> Affine:
    """Return weight (N, D) and bias of the affine map at this path; without what was added to it."""
    return cast(Affine, _half_of(affine_of(at(owner, path)), path))


def all_of(owner: nn.Module, path: str) -> Affine:
    """Return weight (N, D) and bias of the affine map at this path; raise if the module is more than that.

    Raises:
        ValueError: for a module that is more: an adapter, hooks, a forward of its own.
    """
    part = part_at(owner, path)
    if not isinstance(part, Affine):
        module = at(owner, path)
        raise ValueError(
            f"model: {path} is a {type(module).__name__} whose weight must not be read alone, because "
            f"{more_than_affine(module)}; remove that first (merge an adapter, remove hooks), and add it again "
            "afterwards"
        )
    return part


def part_at(owner: nn.Module, path: str) -> Part:
    """Return the affine map at this path, or the module where it is more."""
    return _half_of(part_of(at(owner, path)), path)


def holder_in(module: nn.Module) -> nn.Module | None:
    """Return what holds a Sequential's gating: its block's first Linear, also where an adapter is around it."""
    return next((part for part in module.modules() if isinstance(part._modules.get("gating"), BlockGating)), None)


def dropout_rate(owner: nn.Module, path: str | None) -> float:
    """Return how much the dropout at this path drops now."""
    dropout = None if path is None else at(owner, path)
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
