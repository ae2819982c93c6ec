"""What every conditional layer shares: gater, gates, the control of their rate, and what was counted of them."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from gatelet._checks import check_count, check_logits, check_rate, is_transformed
from gatelet._recompute import Passes, recomputing
from gatelet.estimators import Estimator, resolve
from gatelet.estimators._distributed import alone, noting, repeating, sign_of_life
from gatelet.nn import gaters
from gatelet.nn._units import ALL_HERE, Units
from gatelet.nn.gaters import Gater, GaterError, PreviewGater, SelfGater, ThresholdUnit, TwoStageGater
from gatelet.nn.parts import Affine, ByUnit, part_of
from gatelet.sparsity._controller import Controller, Penalised
from gatelet.sparsity.adaptive_l1 import AdaptiveL1
from gatelet.sparsity.kl_rate import KLRate
from gatelet.units import StochasticUnit


class PlainGater(NamedTuple):
    """Both affine maps of a :class:`Gater`, and the logit above which gates are open."""

    hidden: Affine
    last: Affine
    threshold: Tensor


class ConditionalLayer(Penalised):
    """Gates of a wide layer's units: gater, stochastic unit, sparsity controllers, statistics.

    h = gate(gater(x)) (section 5). Conditional layers derive from it; a block that :func:`gatelet.convert` found
    has one as its submodule ``gating``.

    Args:
        in_features: D.
        units: N, a multiple of ``group_size``.
        bottleneck: M, the width of the gater's hidden layer; None where ``gater`` is a module.
        flops_per_unit: what a token spends on an open unit, for :func:`gatelet.report`.
        estimator, target_rate, group_size, sparsity, detach_gater_input: as for :class:`ConditionalLinear`.
        gater: ``"mlp"``, a network with a bottleneck (:class:`Gater`); ``"two_stage"``, one that first chooses
            groups of units (:class:`TwoStageGater`); ``"self"``, the layer's own activation (:class:`SelfGater`), or
            ``"preview"``, what its units add to the output (:class:`PreviewGater`), for which neither
            ``bottleneck`` nor ``estimator`` counts; or any module that maps (..., D) to
            (..., N / group_size) logits.

    Attributes:
        active_fraction: the share of gates ≠ 0 in the last forward pass, a tensor (reading it may synchronise); of
            several processes, of this one's part of the batch.
        opened: (N / group_size,), how often each gate was open since the layer last changed its mode
            (``train()``, ``eval()``), out of ``tokens``. Neither is in ``state_dict``; compiled code does not count,
            and what activation checkpointing repeats counts once.

    Raises:
        ValueError: for sizes that are not integers of at least 1, a group size that does not divide N, a rate
            outside (0, 1), an unknown estimator or gater, a gater whose output has another width, or one by name
            that costs as much as closed units save (of a module's cost a warning tells); at the call for an input of
            another width or not finite.

    >>> import torch
    >>> ConditionalLayer(8, 32, bottleneck=4, flops_per_unit=16)(torch.randn(3, 8)).shape
    torch.Size([3, 32])
    """

    gater: Any  # a module
    unit: StochasticUnit
    tokens: int | Tensor
    split: Units = ALL_HERE  # which units are on this process

    def __init__(
        self,
        in_features: int,
        units: int,
        bottleneck: int | None,
        flops_per_unit: int,
        estimator: str | Estimator = "straight_through",
        target_rate: float | None = 0.1,
        group_size: int = 1,
        sparsity: Sequence[Controller] | None = None,
        detach_gater_input: bool = False,
        gater: str | nn.Module = "mlp",
        *,
        units_name: str = "units",
    ) -> None:
        super().__init__()
        check_count(units, units_name)
        if units % check_count(group_size, "group_size"):
            raise ValueError(f"group_size must divide {units_name}: {group_size} does not divide {units}")
        if target_rate is not None:
            check_rate(target_rate)
        self.in_features, self.num_gates, self.group_size = in_features, units // group_size, group_size
        self.flops_per_unit = check_count(flops_per_unit, "flops_per_unit")
        if isinstance(gater, str) and gater in gaters.OWN:
            self._gate_by_itself(gater, target_rate, sparsity)
        else:
            self.gater = gaters.resolve(gater, in_features, self.num_gates, bottleneck, detach_gater_input)
            self._gate_by_network(estimator, target_rate, sparsity, isinstance(gater, str))
        for controller in self.sparsity:
            cast(Controller, controller).for_gates(self.num_gates)
        self.fully_open = False
        self.mask: Tensor | None = None
        self.mask_met = False  # whether a call has had the mask's own shape since it was set
        self.tokens = 0
        self._opened: Tensor | None = None  # not a buffer: to_empty() would leave it undefined
        self._passes = Passes()
        self.laid = ByUnit()
        self._last: tuple[Tensor, Any] | None = None  # counts and tokens of the last forward pass

    def _gate_by_network(
        self,
        estimator: str | Estimator,
        target_rate: float | None,
        sparsity: Sequence[Controller] | None,
        named: bool,
    ) -> None:
        self._probed_flops = gaters.probe(self.gater, self.in_features, self.num_gates)
        estimator = resolve(estimator)
        if estimator.event_dims > 1:
            raise ValueError(
                f"estimator: a categorical {type(estimator).__name__} has one open class per variable; a layer's gates "
                'open each for itself, so it needs kind="bernoulli"'
            )
        if not estimator.rated:
            target_rate = None
        self.unit = StochasticUnit(estimator, 0.5 if target_rate is None else None, target_rate)
        if (
            target_rate is not None
        ):  # start at the target rate; from 0, where the paper starts, most gates are open and epochs are lost
            if (start_at := getattr(self.gater, "start_at", None)) is not None:
                start_at(estimator.logit_at(target_rate), target_rate)
            self._check_saves(target_rate, named)
        if sparsity is None:
            sparsity = [] if target_rate is None else [self._default_controller(target_rate)]
        self.sparsity = nn.ModuleList(sparsity)

    def _gate_by_itself(self, name: str, target_rate: float | None, sparsity: Sequence[Controller] | None) -> None:
        if self.group_size > 1:
            raise ValueError(
                f"group_size must be 1 with gater={name!r}, where each unit decides, not {self.group_size}"
            )
        if target_rate is None:
            raise ValueError(f"target_rate: gater={name!r} needs one; its threshold is calibrated to it")
        self.gater = gaters.OWN[name](self.in_features, self.num_gates)
        self.unit = ThresholdUnit(target_rate)
        self.sparsity = nn.ModuleList(sparsity or [])

    def _default_controller(self, target_rate: float) -> Controller:
        probe = torch.zeros(1, requires_grad=True, device="cpu")
        smooth = self.unit.estimator.fire_probability(probe).requires_grad
        return KLRate(target_rate) if smooth else AdaptiveL1(target_rate)

    @property
    def flops_gater(self) -> int:
        """FLOPs of a token for the gates: for ``"self"`` and ``"preview"`` the maps that are computed in full.

        If a gater has no ``flops``, those of its matrix products were counted.
        """
        if isinstance(self.gater, SelfGater):
            return self._flops_in_full * self.units
        return int(getattr(self.gater, "flops", self._probed_flops))

    @property
    def _flops_in_full(self) -> int:
        """Of a unit, where its own numbers decide: one map into it, or both with W_g for ``"preview"``."""
        both = isinstance(self.gater, PreviewGater) and self.has_glu
        return (4 if both else 2) * self.in_features

    @property
    def has_glu(self) -> bool:
        """Whether units have a second map W_g; a layer that can says so."""
        return False

    @property
    def flops_open(self) -> int:
        """Further FLOPs of a token for an open unit."""
        return self.flops_per_unit - (self._flops_in_full if isinstance(self.gater, SelfGater) else 0)

    def _check_saves(self, target_rate: float, named: bool) -> None:
        """Raise if the gater costs as much as the closed units save; warn if it is the user's own module."""
        dense, cost = self.units * self.flops_per_unit, self.flops_gater
        saved = (1 - target_rate) * dense
        if cost < saved:
            return
        most = "a cheaper one"
        if type(self.gater) is Gater:
            most = f"a bottleneck far under {int(saved / (2 * (self.in_features + self.num_gates)))}"
        told = (
            f"gater: it costs {cost:,} FLOPs per token, but closing {1 - target_rate:.0%} of the {self.units:,} units "
            f"saves only {saved:,.0f} of their {dense:,}; take {most}"
        )
        if named:
            raise GaterError(told)
        warnings.warn(told, stacklevel=4)

    @property
    def units(self) -> int:
        """N."""
        return self.num_gates * self.group_size

    def forward(
        self,
        x: Float[Tensor, "*lead D"],
        *,
        mask: Bool[Tensor, "*lead"] | None = None,
        noise: Float[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*lead G"]:
        """Return the gates, one per group of units."""
        return self.decide(x, mask, noise, generator)[0]

    def decide(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        activation: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gates (..., N / group_size), count them, and in training keep the penalty of their rate.

        With them comes where the estimator wants ∂L/∂h, if that is at a random share of the closed gates too;
        otherwise None.

        Tokens where ``mask`` is false (padding) have all gates closed and count nowhere: not in the statistics, not
        in the penalty, and their logits receive no gradient. In training the controllers' state moves, once per forward
        pass with gradients, however often it is repeated; a look without gradients moves nothing. ``activation``
        (..., N) is what a :class:`gatelet.nn.SelfGater` decides by.
        """
        return self.decide_unpadded(*self.without_padding(x, mask), noise, generator, activation)

    def without_padding(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the input with zeros at padding, and which tokens are not padding."""
        if not hasattr(x, "dim"):
            check_logits(x, "x")  # says what it is
        mask = self._mask_of(x) if mask is None else _as_mask(mask, x)
        if mask is None or self.fully_open:
            return x, mask
        return torch.where(mask.unsqueeze(-1), x, torch.zeros_like(x)), mask

    def decide_unpadded(
        self,
        x: Tensor,
        mask: Tensor | None,
        noise: Tensor | None,
        generator: torch.Generator | None,
        activation: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what :meth:`decide` does, for what :meth:`without_padding` returned."""
        if self.fully_open:
            self.keep_penalty(x.new_zeros(()), x)
            return x.new_ones((*x.shape[:-1], self.num_gates)), None
        if not (torch.compiler.is_compiling() or (self.training and torch.is_grad_enabled())):
            sign_of_life()
        if mask is None and noise is None and not self.training and (settled := self._settled(x)) is not None:
            return settled, None
        if torch.compiler.is_compiling() or not self.training or is_transformed(x):
            gates, support, term = self._drawn(x, mask, noise, generator, activation)
        elif not torch.is_grad_enabled():  # without gradients: no state moves, and no other process is waited for
            with self._state(self._snapshot()), alone():
                gates, support, term = self._drawn(x, mask, noise, generator, activation)
        else:
            draws = noise is None and generator is None
            seen = self._passes.recall(x, draws, type(self).__name__) if recomputing() else None
            if seen is not None:
                state, exchanged, source = seen
                with self._state(state), repeating(exchanged):
                    return self._drawn(x, mask, noise, _at(generator, source), activation)[:2]
            state, exchanged = self._snapshot(), []
            source = None if generator is None else generator.get_state()
            self._passes.remember(x, (state, exchanged, source), draws)
            with noting(exchanged):
                gates, support, term = self._drawn(x, mask, noise, generator, activation)
        if not recomputing():
            self._count(gates.detach(), mask)
        return gates if term is None else self.keep_penalty(term, gates), support

    def _snapshot(self) -> list[dict[str, Tensor]]:
        """Return copies of the controllers' buffers."""
        parts = [part for control in self.sparsity for part in control.modules()]
        return [{name: value.clone() for name, value in part.named_buffers(recurse=False)} for part in parts]

    @contextmanager
    def _state(self, state: list[dict[str, Tensor]]) -> Iterator[None]:
        """Give the controllers copies of this state inside the block; afterwards they have their own again."""
        parts = [part for control in self.sparsity for part in control.modules()]
        before = [dict(part._buffers) for part in parts]
        try:
            for part, values in zip(parts, state, strict=True):
                part._buffers.update({name: value.clone() for name, value in values.items()})
            yield
        finally:
            for part, own in zip(parts, before, strict=True):
                part._buffers.update(own)

    def _drawn(
        self,
        x: Tensor,
        mask: Tensor | None,
        noise: Tensor | None,
        generator: torch.Generator | None,
        activation: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gates; where their gradient is needed (None: where they are open); in training their penalty."""
        controllers = cast(list[Controller], list(self.sparsity))
        further = (self.unit.threshold,) if self._skips(controllers) else () if activation is None else (activation,)
        logits: Tensor = self.gater(x, *further)
        for controller in controllers:
            logits = controller.shift(logits, generator=generator)
        if mask is not None:
            logits = torch.where(mask.unsqueeze(-1), logits, logits.detach())
        if not torch.compiler.is_compiling():
            self.unit.mask = mask
        method, support = self.unit.estimator, None
        sampled = method.support == "sampled" and (self.training or self.unit.sample_in_eval)
        if sampled and noise is None:  # drawn here, since the noise says which closed gates need a gradient
            noise = method.draw_noise(logits.unsqueeze(0), generator).squeeze(0)
        gates: Tensor = self.unit(logits, noise=noise, generator=generator)
        if sampled and noise is not None and gates.requires_grad:
            support = (gates.detach() != 0) | method.computed(noise)
        if mask is not None:
            gates = gates * mask.unsqueeze(-1)
            support = None if support is None else support & mask.unsqueeze(-1)
        if not self.training:
            return gates, support, None
        seen = (logits, gates) if mask is None else (logits[mask], gates[mask])
        terms = [control.penalty(self.unit.estimator, *seen) for control in controllers]
        if isinstance(self.gater, TwoStageGater):
            terms.append(self.gater.penalty(mask))
        return gates, support, sum((term for term in terms if term is not None), start=logits.new_zeros(()))

    def _skips(self, controllers: list[Controller]) -> bool:
        """Whether only logits above the threshold matter, and the gater can leave out others.

        Code that listens to the unit, as calibration does, needs them all.
        """
        unit, method = self.unit, self.unit.estimator
        if not isinstance(self.gater, TwoStageGater) or self.training or unit.sample_in_eval:
            return False
        if unit._forward_hooks or unit._forward_pre_hooks or torch.compiler.is_compiling():
            return False
        compares = type(method).deterministic is Estimator.deterministic and method.form.rated
        return compares and all(type(control).shift is Controller.shift for control in controllers)

    def _settled(self, x: Tensor) -> Tensor | None:
        """Return the gates of an ordinary call in ``eval()`` without gradients on the CPU; None: go the long way.

        This, :meth:`settled_by_itself` and ``_one_pass`` are short cuts for speed: for a few tokens the calls into
        torch, not the arithmetic, are most of the gates' time. They give what the long way (:meth:`decide_unpadded`)
        gives, and return None where anything could differ: a hook, a mask, another gater. Here the unit still decides,
        in ``unit.settle``; only the gater and the counting take fewer calls.
        """
        found = self.plain_gater(x)
        if found is None:
            return None
        within = F.linear(x, *found.hidden)
        # If x is not finite, this is not; the long way then says which number it is.
        if not math.isfinite(within.sum().item()):
            return None
        gates: Tensor = self._modules["unit"].settle(F.linear(within.tanh_(), *found.last))  # type: ignore
        self._note(gates, gates.shape[:-1].numel())
        return gates

    def plain_gater(self, x: Tensor) -> PlainGater | None:
        """Return both affine maps of a :class:`Gater` and the threshold, where nothing else decides in ``eval()``.

        That is in an ordinary call without gradients on the CPU. Attributes are read from nn.Module's own dictionaries,
        because looking them up would take longer than the gates of a token.
        """
        gater, unit = self._modules["gater"], self._modules["unit"]
        if type(gater) is not Gater or type(unit) is not StochasticUnit or unit.sample_in_eval:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
            return None
        for module in (gater, unit):
            state = module.__dict__
            if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
                return None
        hidden, last = part_of(gater._modules["hidden"]), part_of(gater._modules["gates"])
        if not isinstance(hidden, Affine) or not isinstance(last, Affine) or not unit.estimator.settles():
            return None
        for control in self._modules["sparsity"]:  # type: ignore
            if type(control).shift is not Controller.shift:
                return None
        threshold, dtype = cast(Tensor, unit._buffers["threshold"]), x.dtype
        if is_transformed(x) or torch.is_autocast_enabled("cpu") or x.dim() == 0:
            return None
        if x.shape[-1] != hidden.weight.shape[1]:
            return None
        if not (dtype is hidden.weight.dtype is last.weight.dtype is threshold.dtype):
            return None
        return PlainGater(hidden, last, threshold)

    def settled_by_itself(self, first: Tensor) -> Tensor | None:
        """Return the gates of a :class:`SelfGater` for an ordinary call; None: go the long way."""
        gater, unit = self._modules["gater"], self._modules["unit"]
        if not isinstance(gater, SelfGater) or type(gater) not in gaters.OWN.values() or self.mask is not None:
            return None
        if type(unit) is not ThresholdUnit:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(first) is not Tensor:
            return None
        if gater._forward_hooks or gater._forward_pre_hooks or unit._forward_hooks or unit._forward_pre_hooks:
            return None
        if self._modules["sparsity"] or first.device.type != "cpu" or is_transformed(first):
            return None
        if first.dtype is not gater.scale.dtype:
            return None
        gates: Tensor = unit.settle(first.abs().mul_(gater.scale))
        self._note(gates, gates.shape[:-1].numel())
        return gates

    def _note(self, gates: Tensor, tokens: int) -> None:
        """Count binary gates; what :meth:`_count` does, for ordinary tensors without a mask."""
        counts = gates.flatten(0, -2).sum(0, dtype=torch.float32) if tokens != 1 else gates.flatten()
        self.counts().add_(counts.long())
        self.noted(counts, tokens)

    def counts(self) -> Tensor:
        """Return the tensor behind ``opened``, to which counts are added."""
        opened: Tensor | None = self.__dict__["_opened"]
        return self.opened if opened is None or opened.device.type != "cpu" else opened

    def noted(self, counts: Tensor, tokens: int) -> None:
        """Record the counts of the last call; ``opened`` includes them already."""
        state = self.__dict__  # nn.Module looks a dozen times before it sets an attribute
        state["_last"], state["tokens"] = (counts, tokens), state["tokens"] + tokens

    def _count(self, gates: Tensor, mask: Tensor | None) -> None:
        if torch.compiler.is_exporting():
            return
        # Sums of zeros and ones are exact in float32, and several times faster than counting.
        each = gates if self.unit.estimator.binary else (gates != 0).to(gates.dtype)
        counts = each.sum(tuple(range(gates.dim() - 1)), dtype=torch.float32) if gates.dim() > 1 else each
        tokens: Any = gates.shape[:-1].numel() if mask is None else mask.sum()
        self._last = (counts, tokens)
        if not torch.compiler.is_compiling() and not is_transformed(gates):
            self.opened.add_(counts.long())
            self.tokens = self.tokens + tokens

    @property
    def opened(self) -> Tensor:
        """How often each gate was open, (N / group_size,)."""
        device = self.unit.threshold.device
        if self._opened is None or self._opened.device != device:
            with torch.inference_mode(False):  # counted in one, it could be counted in nowhere else
                before = 0 if self._opened is None else self._opened.to(device)
                self._opened = torch.zeros(self.units // self.group_size, dtype=torch.int64, device=device) + before
        return self._opened

    @property
    def active_fraction(self) -> Tensor:
        """The share of gates ≠ 0 in the last forward pass, of this process (``gatelet.report``: of all)."""
        if self._last is None:
            return torch.tensor(float("nan"))
        counts, tokens = self._last
        share: Tensor = counts.mean() / tokens
        return share

    def reset_statistics(self) -> None:
        """Forget what was counted."""
        self._opened, self.tokens = None, 0

    def train(self, mode: bool = True) -> "ConditionalLayer":
        """Set the mode; a change of it resets the counts."""
        self.laid.forget()
        if mode != self.training:
            self.reset_statistics()
        return super().train(mode)

    def needs_dense(self, x: Tensor, gates: Tensor) -> bool:
        """Whether closed units must be computed as well, or no kernel could run."""
        # support "open" or "none": a closed gate sends no gradient, so its unit need not be known. Straight-through
        # wants ∂L/∂h of all closed gates: dense, as long as there is a gradient to send.
        wants_all = self.unit.estimator.support == "all" and gates.requires_grad
        return wants_all or self.fully_open or torch.is_autocast_enabled(x.device.type) or is_transformed(x)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.in_features}, {self.units}, group_size={self.group_size}"

    def _mask_of(self, x: Tensor) -> Tensor | None:
        """Return the mask of :func:`masking` for these tokens; tokens that ``generate()`` adds are not padding."""
        if self.mask is None:
            return None
        mask, lead = self.mask, x.shape[:-1]
        if mask.shape == lead:
            self.mask_met = True
            return mask.bool()
        if mask.dim() != 2 or len(lead) != 2 or lead[0] % max(1, len(mask)) or lead[0] == 0:
            return _as_mask(mask, x)
        mask = mask.bool().repeat_interleave(lead[0] // len(mask), dim=0)  # beams, several answers
        new = lead[1] - mask.shape[1]
        if new == 0 or not self.mask_met:
            self.mask_met = self.mask_met or new == 0
            return _as_mask(mask, x)
        return None if new < 0 else torch.cat([mask, mask.new_ones(len(mask), new)], dim=1)


def _at(generator: torch.Generator | None, state: Tensor | None) -> torch.Generator | None:
    """Return a generator of this kind in this state."""
    if generator is None or state is None:
        return None
    return torch.Generator(generator.device).set_state(state)


def _as_mask(mask: Tensor, x: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.shape != x.shape[:-1]:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be one boolean per token, shape {tuple(x.shape[:-1])}, not {found}")
    return mask.bool()


def conditional_layers(model: nn.Module) -> dict[str, ConditionalLayer]:
    """Return the model's conditional layers by name; raise if there are none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, ConditionalLayer)}
    if not found:
        raise ValueError("model: holds no conditional layer")
    return found


@contextmanager
def fully_open(model: nn.Module) -> Iterator[None]:
    """Open all gates of the model's conditional layers inside the block: the dense model, gaters not run.

    Args:
        model: holds conditional layers.

    Raises:
        ValueError: if it holds none.

    >>> import torch, gatelet
    >>> layer = gatelet.nn.ConditionalLinear(8, 16, bottleneck=4)
    >>> x = torch.randn(3, 8)
    >>> with fully_open(layer):
    ...     bool(torch.equal(layer(x), layer.expert(x)))
    True
    """
    layers = list(conditional_layers(model).values())
    before = [layer.fully_open for layer in layers]
    try:
        for layer in layers:
            layer.fully_open = True
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer.fully_open = flag


@contextmanager
def masking(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Give all conditional layers of the model this padding mask inside the block, where no argument reaches them.

    Once a layer has met tokens of the mask's shape, later ones in the block may be more or others: those that
    ``generate()`` adds to a prompt, with a cache or without. They are no padding; several sequences per prompt
    (beams) have their prompt's mask.

    Args:
        model: holds conditional layers, all of which see tokens of the mask's shape.
        mask: true (or not 0) at tokens, false at padding; None: no padding.

    Raises:
        ValueError: if the model holds no conditional layer; at the call, for a first call of another shape.

    >>> import torch, gatelet
    >>> layer = gatelet.nn.ConditionalFFN(8, 32, bottleneck=4)
    >>> with masking(layer, torch.tensor([[True, False]])):
    ...     layer(torch.randn(1, 2, 8)).shape
    torch.Size([1, 2, 8])
    """
    layers = list(conditional_layers(model).values())
    before = [(layer.mask, layer.mask_met) for layer in layers]
    try:
        for layer in layers:
            layer.mask, layer.mask_met = mask, False
        yield
    finally:
        for layer, previous in zip(layers, before, strict=True):
            layer.mask, layer.mask_met = previous
