"""A feed-forward layer that computes, for each token, only the hidden units that its gates open."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from gatelet._checks import check_choice, check_count, check_weight
from gatelet.estimators import Estimator
from gatelet.kernels import ACTIVATIONS as FUSED
from gatelet.kernels import gated_ffn, gated_input_linear, gated_linear, open_pattern
from gatelet.nn._one_pass import one_pass
from gatelet.nn._units import ALL_HERE, Units
from gatelet.nn.conditional_layer import ConditionalLayer
from gatelet.nn.gaters import PreviewGater, SelfGater
from gatelet.nn.parts import Affine, Part, all_affine, apply, part_of
from gatelet.sparsity._controller import Controller

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
"""The activations by name; ``gelu`` is the exact one, with the error function."""


def feed_forward(
    x: Tensor,
    gating: ConditionalLayer,
    activation: str,
    up: Part,
    down: Part,
    glu: Part | None = None,
    dropout: float = 0.0,
    *,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return W2 (hidden ∘ h) + b2, hidden = act(W1 x + b1), or act(W_g x + b_g) * (W1 x + b1) with ``glu``.

    ``up`` is W1 and b1, ``down`` W2 and b2, ``glu`` W_g and b_g; ``dropout`` acts on the hidden layer. Where one of
    them is more than an affine map, all three run densely, by their own forward.
    """
    x, mask = gating.without_padding(x, mask)
    if gating.split is not ALL_HERE:
        return _over_processes(x, gating, activation, up, down, glu, mask, noise, generator)
    if gating.fully_open:
        gating.decide_unpadded(x, mask, None, None)
        return apply(down, F.dropout(hidden_layer(x, activation, up, glu), dropout, dropout > 0))
    if isinstance(gating._modules["gater"], SelfGater):
        return _by_itself(x, gating, activation, up, down, glu, dropout, mask)
    if mask is None and noise is None and (found := one_pass(x, gating, activation, up, down, glu)) is not None:
        return found
    gates, support = gating.decide_unpadded(x, mask, noise, generator)
    return _gated(x, gates, support, gating, activation, up, down, glu, dropout)


def _gated(
    x: Tensor,
    gates: Tensor,
    support: Tensor | None,
    gating: ConditionalLayer,
    activation: str,
    up: Part,
    down: Part,
    glu: Part | None,
    dropout: float,
) -> Tensor:
    """Return the gated units' part of the output, computed densely only if ``dense`` asks for it."""
    if gating.needs_dense(x, gates) or not all_affine(up, down, glu):
        each = gates.repeat_interleave(gating.group_size, dim=-1) if gating.group_size > 1 else gates
        return apply(down, F.dropout(hidden_layer(x, activation, up, glu) * each, dropout, dropout > 0))
    up, down, glu = _by_unit(gating, up, down, glu)
    w_gate, b_gate = (None, None) if glu is None else glu
    args = (gates, activation, *up, w_gate, b_gate, *down, gating.group_size, gating.unit.target_rate)
    if not dropout and torch.compiler.is_compiling() and (torch.compiler.is_exporting() or not _recording(x, *args)):
        # One opaque op: the kernels' own ops keep what a backward pass needs, patterns among it, whose size ⌈B/64⌉
        # would tie a traced graph to batches of at most 64, or of more.
        found: Tensor = torch.ops.gatelet.conditional_ffn(x, *args)
        return found
    return _sparse(x, *args, dropout=dropout, support=support)


def _over_processes(
    x: Tensor,
    gating: ConditionalLayer,
    activation: str,
    up: Part,
    down: Part,
    glu: Part | None,
    mask: Tensor | None,
    noise: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the sum over the processes of what their units give (:func:`gatelet.nn.spread`)."""
    split = gating.split
    if not all_affine(up, down, glu):
        raise RuntimeError("spread: a Linear of a spread layer has an adapter, a hook or the like; remove it")
    if noise is None and generator is None:
        split.same_noise(x.device)
    gates, support = gating.decide_unpadded(x, mask, noise, generator)
    up, down, glu = _own(split, up), _own(split, down), None if glu is None else _own(split, glu)
    x, bias, down = split.enter(x), down.bias, Affine(down.weight, None)
    if gating.fully_open:
        part = apply(down, hidden_layer(x, activation, up, glu))
    else:
        gates, support = split.slice(gates), None if support is None else split.slice(support)
        part = _gated(x, gates, support, gating, activation, up, down, glu, 0.0)
    y = split.total(part)
    return y if bias is None else y + bias


def _own(split: Units, part: Part) -> Affine:
    assert isinstance(part, Affine)
    return Affine(split.own(part.weight), None if part.bias is None else split.own(part.bias))


def _by_unit(gating: ConditionalLayer, up: Part, down: Part, glu: Part | None) -> tuple[Affine, Affine, Affine | None]:
    """Return the weights with each hidden unit's numbers together."""
    assert isinstance(down, Affine)
    last = Affine(gating.laid.columns("down", down.weight), down.bias)
    return _rows(gating, "up", up), last, None if glu is None else _rows(gating, "glu", glu)


def _rows(gating: ConditionalLayer, name: str, part: Part) -> Affine:
    assert isinstance(part, Affine)
    return Affine(gating.laid.rows(name, part.weight), part.bias)


def _by_itself(
    x: Tensor,
    gating: ConditionalLayer,
    activation: str,
    up: Part,
    down: Part,
    glu: Part | None,
    dropout: float,
    mask: Tensor | None,
) -> Tensor:
    """Return the output where the first map, W_g or without it W1, is computed in full and opens the others' rows.

    With a :class:`gatelet.nn.PreviewGater` both are, and open the columns of W2.
    """
    first = ACTIVATIONS[activation](apply(up if glu is None else glu, x))
    if glu is not None and isinstance(gating.gater, PreviewGater):
        first, glu = first * apply(up, x), None
    settled = None if mask is not None or gating.training else gating.settled_by_itself(first)
    gates = gating.decide_unpadded(x, mask, None, None, first)[0] if settled is None else settled
    rate = gating.unit.target_rate
    if gating.needs_dense(x, gates) or not all_affine(down, None if glu is None else up):
        hidden = first * gates if glu is None else first * gates * apply(up, x)
        return apply(down, F.dropout(hidden, dropout, dropout > 0))
    if glu is None:
        up = down  # W1 was computed in full: it is not read again
    up, down, _ = _by_unit(gating, up, down, None)
    up_or_none: tuple[Tensor | None, Tensor | None] = (None, None) if glu is None else up
    args = (x, first, gates, *up_or_none, *down, rate)
    if not dropout and torch.compiler.is_compiling() and (torch.compiler.is_exporting() or not _recording(*args)):
        found: Tensor = torch.ops.gatelet.self_gated_ffn(*args)
        return found
    return _rest(*args, dropout=dropout)


def _rest(
    x: Tensor,
    first: Tensor,
    gates: Tensor,
    w_up: Tensor | None,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    rate: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Return W2 (first ∘ gates ∘ (W1 x + b1)) + b2 at open units only; without W1, W2 (first ∘ gates) + b2."""
    hidden = first * gates
    if w_up is not None and not dropout:  # first ∘ gates is the gate of a pair without an activation
        return gated_ffn(x, w_up, b_up, hidden, "identity", w_down, b_down, active_fraction=rate)
    pattern = open_pattern(gates, 1)
    if w_up is not None:
        hidden = hidden * gated_linear(x, w_up, b_up, gates, pattern=pattern, active_fraction=rate)
    return gated_input_linear(F.dropout(hidden, dropout, dropout > 0), pattern, w_down, b_down)


_rest_op = torch.library.custom_op(
    "gatelet::self_gated_ffn",
    _rest,
    mutates_args=(),
    schema="(Tensor x, Tensor first, Tensor gates, Tensor? w_up, Tensor? b_up, Tensor w_down, Tensor? b_down, "
    "float? rate) -> Tensor",
)


@_rest_op.register_fake
def _(
    x: Tensor,
    first: Tensor,
    gates: Tensor,
    w_up: Tensor | None,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    rate: float | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


def _recording(*values: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _sparse(
    x: Tensor,
    gates: Tensor,
    activation: str,
    w_up: Tensor,
    b_up: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    group_size: int,
    rate: float | None,
    dropout: float = 0.0,
    support: Tensor | None = None,
) -> Tensor:
    """Return the output, computed at open units only, and at those whose gate wants a gradient (``support``)."""
    if w_gate is None and activation in FUSED and not dropout and support is None:
        return gated_ffn(x, w_up, b_up, gates, activation, w_down, b_down, active_fraction=rate)
    computed = (gates.detach() != 0 if support is None else support).to(x.dtype)
    pattern = open_pattern(computed, group_size)
    linear, act = partial(gated_linear, pattern=pattern, active_fraction=rate), ACTIVATIONS[activation]
    if w_gate is None:
        hidden = act(linear(x, w_up, b_up, computed))
    else:
        hidden = act(linear(x, w_gate, b_gate, computed)) * linear(x, w_up, b_up, computed)
    hidden = hidden * (gates.repeat_interleave(group_size, dim=-1) if group_size > 1 else gates)
    return gated_input_linear(F.dropout(hidden, dropout, dropout > 0), pattern, w_down, b_down)


_op = torch.library.custom_op(
    "gatelet::conditional_ffn",
    _sparse,
    mutates_args=(),
    schema="(Tensor x, Tensor gates, str activation, Tensor w_up, Tensor? b_up, Tensor? w_gate, Tensor? b_gate, "
    "Tensor w_down, Tensor? b_down, int group_size, float? rate) -> Tensor",
)


@_op.register_fake
def _(
    x: Tensor,
    gates: Tensor,
    activation: str,
    w_up: Tensor,
    b_up: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    group_size: int,
    rate: float | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


def hidden_layer(x: Tensor, activation: str, up: Part, glu: Part | None) -> Tensor:
    """Return act(W1 x + b1), or act(W_g x + b_g) * (W1 x + b1)."""
    act = ACTIVATIONS[activation]
    return act(apply(up, x)) if glu is None else act(apply(glu, x)) * apply(up, x)


class ConditionalFFN(ConditionalLayer):
    """Feed-forward layer of a transformer; a gater opens a few of its hidden units per token.

    y = W2 (act(W1 x + b1) ∘ h) + b2, and gated, as in Llama: y = W2 ((act(W_g x + b_g) * (W1 x + b1)) ∘ h) + b2;
    h = gate(gater(x)) (section 5 of the paper, whose conditional layer this is, with the next layer behind it).

    Closed units' rows of W1 and columns of W2 are not read (:func:`gatelet.kernels.gated_ffn`): in ``eval()``, and in
    training with every estimator that asks nothing of closed units (its ``support`` is not ``"all"``). The submodules
    are ``up`` (W1), ``down`` (W2) and ``glu`` (W_g), ordinary Linears; what is added to one (LoRA, pruning, hooks) is
    honoured by running it densely.

    Bias and variance are the estimator's.

    Args:
        d_model: D, of input and output.
        d_ff: N, the hidden units.
        bottleneck: M, the width of the gater's hidden layer; None where ``gater`` is a module.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"silu"`` or ``"tanh"``.
        gated: with W_g.
        estimator: a name of ``gatelet.estimators.ALL`` or an instance.
        target_rate: the share of gates to be open over the tokens; as for :class:`ConditionalLinear`.
        group_size: consecutive units that share a gate; divides N.
        sparsity: the controllers that hold the rate; as for :class:`ConditionalLinear`.
        detach_gater_input: let no gradient pass from the gates into the input.
        dropout: on the hidden layer, in training.
        bias: with b1, b2 and b_g.
        gater: ``"mlp"``, ``"two_stage"`` or a module, as for :class:`ConditionalLinear`, which must cost less than
            closed units save; or ``"self"``: act(W_g x + b_g) (or, without W_g, act(W1 x + b1)) is computed in full,
            and open are the units where its absolute value exceeds a threshold, which
            :func:`gatelet.sparsity.calibrate_thresholds` sets before the first call; or ``"preview"``: likewise by
            |act(W_g x + b_g) ∘ (W1 x + b1)|, for which both maps are computed (:class:`PreviewGater`). Nothing is
            trained then; neither ``bottleneck`` nor ``estimator`` counts.

    Attributes:
        active_fraction: the share of gates ≠ 0 in the last forward pass, over the tokens that are not padding; of
            several processes, of this one's part of the batch.

    Raises:
        ValueError: for sizes that are not integers of at least 1, a group size that does not divide N, a gater
            that saves nothing or gives another width, a rate or a dropout outside of its range, an unknown activation,
            estimator or gater; at the call for an input of another width or not finite.

    >>> import torch
    >>> layer = ConditionalFFN(64, 256, bottleneck=8, activation="silu", gated=True, target_rate=0.25)
    >>> layer(torch.rand(2, 10, 64)).shape
    torch.Size([2, 10, 64])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 5.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        bottleneck: int | None = None,
        activation: str = "gelu",
        gated: bool = False,
        estimator: str | Estimator = "straight_through",
        target_rate: float | None = 0.1,
        group_size: int = 1,
        sparsity: Sequence[Controller] | None = None,
        detach_gater_input: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        gater: str | nn.Module = "mlp",
    ) -> None:
        flops = 2 * check_count(d_model, "d_model") * (3 if gated else 2)
        gating = (estimator, target_rate, group_size, sparsity, detach_gater_input)
        super().__init__(d_model, d_ff, bottleneck, flops, *gating, gater, units_name="d_ff")
        self.activation = check_choice(activation, ACTIVATIONS, "activation")
        if check_weight(dropout, "dropout") >= 1:
            raise ValueError(f"dropout must lie in [0, 1), not {dropout!r}")
        self.dropout = dropout
        self.up = nn.Linear(d_model, d_ff, bias)
        self.glu = nn.Linear(d_model, d_ff, bias) if gated else None
        self.down = nn.Linear(d_ff, d_model, bias)
        for linear in (self.up, self.glu, self.down):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Float[Tensor, "*lead D"],
        *,
        mask: Bool[Tensor, "*lead"] | None = None,
        noise: Float[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*lead D"]:
        """Return W2 (hidden ∘ h) + b2.

        Args:
            x: (..., D).
            mask: (...), false at padding. A padded token has all its gates closed, so that its output is b2; it counts
                neither in ``active_fraction`` nor in the penalty.
            noise: of the gates, (..., N / group_size), instead of drawing it.
            generator: the source of the noise (also of the controllers'); torch's global one by default.

        Raises:
            ValueError: for an input of another width or not finite, or noise or a mask of another shape.
            TypeError: for an input that is not floating, or not of the weights' dtype (outside of autocast).
        """
        up, down, glu = part_of(self.up), part_of(self.down), None if self.glu is None else part_of(self.glu)
        dropout = self.dropout if self.training else 0.0
        return feed_forward(
            *(x, self, self.activation, up, down, glu, dropout), mask=mask, noise=noise, generator=generator
        )

    @property
    def has_glu(self) -> bool:
        """Whether the layer has a W_g."""
        return self.glu is not None

    def extra_repr(self) -> str:
        """Show the sizes."""
        gated = ", gated=True" if self.glu is not None else ""
        return f"{super().extra_repr()}, activation={self.activation!r}{gated}"
