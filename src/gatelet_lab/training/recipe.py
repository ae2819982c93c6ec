"""A recipe, which decides a run: nested parts, each of which checks itself.

In files and on the command line a recipe is flat: the fields' names are unique over all parts.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args, get_type_hints

from gatelet._checks import check_choice, check_count, check_positive, check_rate
from gatelet.estimators import ALL


@dataclass(frozen=True)
class PaperRow:
    """A row as the paper prints it: train NLL, validation and test error in per cent, of a single run."""

    train_nll: float
    valid_error: float
    test_error: float


def _counts(part: Any, *names: str) -> None:
    for name in names:
        if getattr(part, name) is not None:
            check_count(getattr(part, name), name)


def _positive(part: Any, *names: str) -> None:
    for name in names:
        if getattr(part, name) is not None:
            check_positive(getattr(part, name), name)


def _at_least_zero(part: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(part, name) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, not {getattr(part, name)!r}")


def _below_one(part: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(part, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), not {getattr(part, name)!r}")


def _choices(part: Any, *names: str) -> None:
    for name in names:
        check_choice(getattr(part, name), get_args(get_type_hints(type(part))[name]), name)


@dataclass(frozen=True)
class Model:
    """The network: its estimator, its layers, and how many such networks vote."""

    estimator: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """The estimator's options."""
    layers: int = 1
    """Conditional layers, one on top of the other."""
    experts: int = 2000
    """Units of each conditional layer."""
    members: int = 1
    """Networks of this size, trained side by side; the mean of their class probabilities is tested."""
    group_size: int = 1
    """Consecutive units that share a gate."""
    kind: Literal["gates", "mixture", "dense"] = "gates"
    """mixture, instead of gates: a top-k mixture of experts, each a group of units, with ``target_rate`` of them open.
    dense: a layer of ReLU units that are all computed, without a gater."""
    norm: bool = False
    """Batch normalisation before a dense layer's ReLU."""

    def __post_init__(self) -> None:
        """Check the estimator with its options, and the sizes."""
        try:
            ALL[check_choice(self.estimator, ALL, "estimator")](**self.options)
        except TypeError as error:
            raise ValueError(f"options: {error}".replace(".__init__()", "")) from error
        _counts(self, "layers", "experts", "members", "group_size")
        if self.experts % self.group_size:
            raise ValueError(f"group_size must divide experts: {self.group_size} does not divide {self.experts}")
        _choices(self, "kind")


@dataclass(frozen=True)
class Gater:
    """The gater and its start: its last layer's weights are drawn in ±gate_scale·√(6/(M + N)), or sparsely (A.4)."""

    gater: Literal["mlp", "two_stage"] = "mlp"
    bottleneck: int = 400
    gater_groups: int | None = None
    """Groups of a gater in two stages; None: about the square root of the number of gates."""
    gater_norm: bool = False
    """Batch normalisation before the gater's tanh."""
    gate_scale: float = 4.0
    gate_bias: float | None = 0.0
    """None: such that gates fire at the target rate."""
    sparse_gates: int | None = None
    """How many bottleneck units each gate is connected to at the start; None: all."""

    def __post_init__(self) -> None:
        """Check sizes and start."""
        _choices(self, "gater")
        _counts(self, "bottleneck", "gater_groups", "sparse_gates")
        _positive(self, "gate_scale")
        if self.gate_bias is not None and not math.isfinite(self.gate_bias):
            raise ValueError(f"gate_bias must be a finite number, not {self.gate_bias!r}")


@dataclass(frozen=True)
class Sparsity:
    """The share of open gates and what holds it (A.1, A.2); None: not used."""

    target_rate: float | None = 0.1
    kl_weight: float | None = None
    l1_weight: float | None = None
    beta_noise: float | None = None
    gater_group_rate: float | None = None
    """The share of its groups that a gater in two stages holds open, with the penalty's weight ``kl_weight``; None:
    its own default."""

    def __post_init__(self) -> None:
        """Check rates and weights."""
        if self.target_rate is not None:
            check_rate(self.target_rate)
        if self.gater_group_rate is not None:
            check_rate(self.gater_group_rate, "gater_group_rate")
        _positive(self, "kl_weight", "l1_weight")
        if self.beta_noise is not None and not 1 < self.beta_noise < math.inf:
            raise ValueError(f"beta_noise must be a finite number above 1, not {self.beta_noise!r}")


@dataclass(frozen=True)
class Augmentation:
    """What is done to images, units and labels in training; the paper has only some of it."""

    input_noise: float = 0.0
    """Standard deviation of Gaussian noise on the pixels."""
    adversarial: float = 0.0
    """Length of a step that moves training images towards a higher loss, before they are trained on."""
    adversarial_share: float = 1.0
    """Share of every batch that is moved in this way."""
    mixup_share: float = 0.0
    """Share of every batch whose images are averaged with other images; their targets are the teacher's."""
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    label_smoothing: float = 0.0
    teacher_share: float = 0.0
    """The targets are this share of the class probabilities of the row ``teacher``, and the label for the rest."""

    def __post_init__(self) -> None:
        """Check shares and lengths."""
        _at_least_zero(self, "input_noise", "adversarial")
        _below_one(self, "mixup_share", "input_dropout", "hidden_dropout", "label_smoothing")
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share must lie in [0, 1], not {self.teacher_share!r}")
        if not 0 < self.adversarial_share <= 1:
            raise ValueError(f"adversarial_share must lie in (0, 1], not {self.adversarial_share!r}")
        if self.mixup_share and self.teacher_share < 1:
            raise ValueError(
                f"mixup_share: a mixed image has no label; it needs teacher_share=1, not {self.teacher_share!r}"
            )
        if self.adversarial and self.mixup_share and self.adversarial_share + self.mixup_share > 1:
            raise ValueError(
                f"mixup_share={self.mixup_share!r} and adversarial_share={self.adversarial_share!r} exceed the batch"
            )


@dataclass(frozen=True)
class Optimiser:
    """The steps: by which rule, how large, how many, and the limits on the weights."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 0.0
    schedule: Literal["exponential", "cosine"] = "exponential"
    """cosine: the learning rate rises for an epoch, then falls to zero over ``epochs``; ``rate_decay`` is not used."""
    batch: int = 32
    rate: float = 0.1
    rate_decay: float = 0.98
    """The learning rate is rate · rate_decay^epoch."""
    gater_rate: float = 1.0
    """The gater's learning rate, in multiples of ``rate``."""
    momentum: float = 0.0
    max_norm: float | None = 2.0
    """Limit on the norm of every unit's incoming weights; None: no limit."""
    gater_max_norm: float | None = 2.0
    output_max_norm: float | None = 2.0
    """The same for every class's incoming weights, set apart because it bounds the class scores."""
    average: float = 0.0
    """Decay per step of a moving average of the weights, which is validated and tested in their place; 0: none."""
    bfloat16: bool = False
    """Products in bfloat16 in training; weights, noise, validation and tests stay in float32."""
    epochs: int = 100
    patience: int = 20
    """Stop after this many epochs without a better validation error; ignored with a cosine, whose last weights
    count."""
    more_training: int = 0
    """How many validation images (at most nine in ten) are trained on too, after everything else was chosen."""

    def __post_init__(self) -> None:
        """Check every number."""
        _choices(self, "optimizer", "schedule")
        _counts(self, "batch", "epochs", "patience")
        _positive(self, "rate_decay", "max_norm", "gater_max_norm", "output_max_norm")
        _at_least_zero(self, "rate", "gater_rate", "weight_decay")
        _below_one(self, "momentum", "average")
        if self.more_training < 0:
            raise ValueError(f"more_training must be at least 0, not {self.more_training}")
        if self.more_training:
            check_count(self.more_training, "more_training")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run, except its seed and its data."""

    row: str
    title: str
    paper: PaperRow | None
    model: Model
    gater: Gater = Gater()
    sparsity: Sparsity = Sparsity()
    augmentation: Augmentation = Augmentation()
    optimiser: Optimiser = Optimiser()

    @property
    def gated(self) -> bool:
        """Whether there are gates whose share is held."""
        return self.model.kind == "gates" and self.sparsity.target_rate is not None

    def flat(self) -> dict[str, Any]:
        """Return row, title and the fields of all parts, as results and checkpoints keep them."""
        kept = {key: getattr(getattr(self, part), key) for key, part in _PART.items()}
        return {"row": self.row, "title": self.title, **kept, "options": dict(self.model.options)}

    def but(self, **changes: Any) -> "Recipe":
        """Return the recipe with these fields, whichever part they belong to.

        Raises:
            TypeError: for a field that no part has.
            ValueError: from the checks of a part.
        """
        own = {key: changes.pop(key) for key in ("row", "title", "paper") if key in changes}
        if unknown := sorted(changes.keys() - _PART.keys()):
            raise TypeError(f"a recipe has no field {', '.join(unknown)}")
        parts = {
            part: replace(getattr(self, part), **{key: changes[key] for key in changes if _PART[key] == part})
            for part in {_PART[key] for key in changes}
        }
        return replace(self, **own, **parts)


PARTS: Mapping[str, type] = MappingProxyType(
    {"model": Model, "gater": Gater, "sparsity": Sparsity, "augmentation": Augmentation, "optimiser": Optimiser}
)
_FIELDS: Mapping[str, Field[Any]] = MappingProxyType(
    {each.name: each for part in PARTS.values() for each in fields(part)}
)
_PART: Mapping[str, str] = MappingProxyType({each.name: name for name, part in PARTS.items() for each in fields(part)})
TYPES: Mapping[str, Any] = MappingProxyType(
    {name: kind for part in PARTS.values() for name, kind in get_type_hints(part).items()}
)
"""The type of every field."""
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {name: each.default for name, each in _FIELDS.items() if each.default is not MISSING}
)
"""What a field is in a file that was written before the field existed."""
