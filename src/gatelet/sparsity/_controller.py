"""What a sparsity controller is, and how its penalty reaches the loss."""

import weakref
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet._checks import is_transformed
from gatelet.estimators import Estimator
from gatelet.tape import Tape


class Controller(nn.Module):
    """Holds a conditional layer's share of open gates at a target. Subclasses override one of two hooks.

    Keep what changes from batch to batch in buffers: the layer restores them after activation checkpointing has
    repeated its forward pass, and after a pass without gradients.
    """

    def for_gates(self, count: int) -> None:
        """Take the layer's number of gates before the first batch, so that buffers have their size from the start."""

    def shift(
        self, logits: Float[Tensor, "*lead N"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*lead N"]:
        """Return the logits that the gates are drawn from; ``generator`` is the source of any noise in them."""
        return logits

    def penalty(
        self, estimator: Estimator, logits: Float[Tensor, "*lead N"], gates: Float[Tensor, "*lead N"]
    ) -> Float[Tensor, ""] | None:
        """Return what this batch adds to the loss (None: nothing) and update the state. Only in training."""
        return None


def penalty(model: nn.Module) -> Float[Tensor, ""]:
    """Sum of the sparsity penalties of the model's conditional layers, of the last forward pass.

    A layer that the pass used several times counts each time, as long as its output is still in use; one that the pass
    skipped does not count. In compiled code all uses within one graph count. Whether two graphs belong to one pass
    cannot be known, so that is an error.

    Args:
        model: any module that holds conditional layers.

    Returns:
        a scalar to add to the loss; zero in ``eval()``.

    Raises:
        ValueError: if the model holds no conditional layer.
        RuntimeError: if none of them has run in training since the penalty was last taken; if one ran without
            gradients and a gradient is wanted now (activation checkpointing with ``use_reentrant=True`` does that).

    >>> import torch, gatelet
    >>> layer = gatelet.nn.ConditionalLinear(8, 16, bottleneck=4, estimator="straight_through", target_rate=0.1)
    >>> _ = layer(torch.randn(3, 8))
    >>> gatelet.sparsity.penalty(layer).requires_grad
    True
    """
    layers = [module for module in model.modules() if isinstance(module, Penalised)]
    if not layers:
        raise ValueError("model holds no conditional layer, so there is no sparsity penalty")
    taken = [layer.take_penalty() for layer in layers]
    if any(layer.training for layer in layers) and all(term is None for term in taken):
        raise RuntimeError(
            "sparsity.penalty(model): the model has not run in training since its penalty was last taken; call "
            "it after the forward pass, once"
        )
    terms = [term for term in taken if term is not None]
    if not terms:
        return next(layers[0].parameters()).new_zeros(())
    return torch.stack([term.to(terms[0]) for term in terms]).sum()


class _Use:
    """One use of a layer: its penalty, which lives as long as what the layer returned, and whether a backward pass has
    used it.

    (A penalty that is never taken must not keep a forward pass's whole graph alive.)
    """

    __slots__ = ("__weakref__", "over", "term")

    def __init__(self, term: Tensor) -> None:
        self.term, self.over = term, False


class _Owned(torch.autograd.Function):
    """The identity; its node in the graph keeps a use alive."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, use: _Use) -> Tensor:
        ctx.use = use
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.use.over = True
        return grad, None


_traced: tuple[Any, set[int]] = (None, set())


def _first_in_graph(layer: int) -> bool:
    """Return whether this is the layer's first use in the graph that is being traced."""
    global _traced
    graph = torch._guards.CompileContext.current_trace_id()
    if graph is None or graph != _traced[0]:
        _traced = graph, set()
    met = layer in _traced[1]
    _traced[1].add(layer)
    return not met


# This does what torch.compiler.assume_constant_result does, which would import the compiler and triton.
_first_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _spent(term: Tensor) -> bool:
    """Whether a backward pass has gone through this number's graph and freed what it needs."""
    nodes: list[Any] = [term.grad_fn]
    seen: set[Any] = set()
    while nodes and len(seen) < 100:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [each for each, _ in node.next_functions]
        try:
            for name in dir(node):
                if name == "saved_tensors" or name.startswith("_saved_"):
                    getattr(node, name)
        except RuntimeError:
            return True
    return False


class Penalised(nn.Module):
    """A layer with gates: keeps the penalties of a forward pass until :func:`penalty` takes them."""

    def __init__(self) -> None:
        super().__init__()
        self._penalty: Tensor | None = None  # of the last use
        self._last_use: _Use | None = None
        self._uses: list[weakref.ref[_Use]] = []  # the earlier ones of this forward pass
        self._looked: Tensor | None = None  # of the last use without gradients
        self._before: Tensor | None = None  # of the compiled graph before the last one

    def keep_penalty(self, term: Tensor, gates: Tensor) -> Tensor:
        """Keep the penalty of this use, and return the gates, whose graph then owns it."""
        if not torch.is_grad_enabled():
            self._looked = term
            return gates
        self._looked = None
        if torch.compiler.is_compiling():
            self._keep_traced(term)
            return gates
        if is_transformed(gates):
            self._penalty = term
            return gates
        earlier = [] if self._last_use is None else [*self._uses, weakref.ref(self._last_use)]
        self._uses = [use for use in earlier if (found := use()) is not None and not found.over]
        self._penalty, self._last_use = term, None
        if not term.requires_grad:
            return gates
        self._last_use = _Use(term)
        tape = Tape.current()
        if gates.requires_grad:
            return cast(Tensor, _Owned.apply(gates, self._last_use))
        if tape is not None:  # gates without a gradient: the tape knows how long the pass lives
            tape.own(self._last_use)
        return gates

    def _keep_traced(self, term: Tensor) -> None:
        """Keep the penalty of a use in compiled code: the sum over the uses in one graph, and that of the graph before.

        Whether this is the first use in its graph is decided while the graph is traced; a test at run time would
        compile it again for every answer.
        """
        if _first_in_graph(id(self)):
            self._before, self._penalty = self._penalty, term
        elif self._penalty is not None:
            self._penalty = self._penalty + term

    def take_penalty(self) -> Float[Tensor, ""] | None:
        """Return the penalty of the last forward pass, None if there is none, and forget it: its graph can be freed."""
        alive = [use() for use in self._uses]
        terms = [use.term for use in alive if use is not None]
        terms += [] if self._penalty is None else [self._penalty]
        looked, before = self._looked, self._before
        self._penalty, self._last_use, self._uses, self._looked, self._before = None, None, [], None, None
        if not self.training:  # a penalty from before eval() is not of this forward pass
            return None
        if before is not None and before.requires_grad and not _spent(before):
            raise RuntimeError(
                "sparsity.penalty(model): a conditional layer ran in two compiled graphs since its penalty was last "
                "taken, and only the last one is known to be of this forward pass; take the penalty after each graph, "
                "or compile both uses as one graph (fullgraph=True shows what splits it)"
            )
        if terms:
            return torch.stack([term.to(terms[0]) for term in terms]).sum() if len(terms) > 1 else terms[0]
        if looked is not None and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise RuntimeError(
                "sparsity.penalty(model): a conditional layer ran without gradients, so its penalty has none. It ran "
                "under torch.no_grad(), or under activation checkpointing with use_reentrant=True; call "
                "checkpoint(..., use_reentrant=False), or in transformers "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )
        return looked

    def __getstate__(self) -> dict[str, object]:
        # A graph can be neither copied nor pickled: deepcopy(model) between forward and step must work.
        state: dict[str, object] = {"_penalty": None, "_last_use": None, "_uses": [], "_looked": None, "_before": None}
        return {**super().__getstate__(), **state}
