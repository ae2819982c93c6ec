"""Makes from one declaration of an op what torch needs: schema, fake, autograd, and the direct call without them.

An op is declared by four things: the names and types of its arguments (a NamedTuple, ``Given``), ``forward`` and
``backward`` over a backend's products, and ``naive``, a few lines that autograd differentiates. The naive version says
what the op means. Every backend is tested against it; derivatives of second and higher order, forward-mode derivatives
and ``torch.func`` transforms go through it.
"""

import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gatelet.kernels.pattern import Form, form_of

_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Form | None: "Tensor[]",
    str: "str",
    bool: "bool",
    int: "int",
    float | None: "float?",
}

ORDINARY = (Tensor, torch.nn.Parameter)
"""The types of tensors that kernels read."""


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors outside of tracing and transforms, so that kernels may be called directly."""
    return untraced() and all(t is None or type(t) in ORDINARY for t in tensors)


def untraced() -> bool:
    """Whether nothing traces or transforms what is called now."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None  # torch.jit.trace, which sees ops and no kernels
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def recording(*tensors: Tensor | None) -> bool:
    """Whether autograd records what happens to these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is active, which no kernel supports."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """Raise under ``torch.func`` transforms, for an op whose results have no derivative."""
    if transformed(*tensors):
        raise NotImplementedError(f"{op} does not work under torch.vmap and torch.func transforms: call it outside")


class Op:
    """An op, callable with an instance of its ``Given``.

    Args:
        name: gatelet::name.
        given: the NamedTuple of its arguments, among them ``backend`` and ``keep`` (whether a backward pass follows).
        forward: maps a Given to the output and the tensors that the backward pass reads besides the arguments.
        backward: maps the output's gradient, a Given, those tensors and which gradients are needed to the gradients.
        naive: maps a Given to the output, in operations of torch that autograd differentiates.
        shapes: maps a Given to the shapes of what ``forward`` returns.
        differentiable: the arguments that have a gradient.
    """

    def __init__(
        self,
        name: str,
        given: type[Any],
        forward: Callable[[Any], tuple[Tensor, ...]],
        backward: Callable[[Tensor, Any, tuple[Tensor, ...], tuple[bool, ...]], tuple[Tensor | None, ...]],
        naive: Callable[[Any], Tensor],
        shapes: Callable[[Any], tuple[tuple[Any, ...], ...]],
        differentiable: tuple[str, ...],
    ) -> None:
        self.name, self.given, self.naive = name, given, naive
        self.forward, self.backward, self.shapes = forward, backward, shapes
        fields = typing.get_type_hints(given)
        self.count = len(fields)
        self.places = tuple(list(fields).index(each) for each in differentiable)
        self.forms = {index for index, kind in enumerate(fields.values()) if kind == Form | None}
        arguments = ", ".join(f"{_SCHEMA[kind]} {each}" for each, kind in fields.items())
        results = len(typing.get_args(typing.get_type_hints(forward)["return"]))
        self._traced = self._declare(name, arguments, results, self._forward, self._fake)
        back = f"Tensor grad, {arguments}, Tensor[] kept, bool[] need"
        self._traced_backward = self._declare(
            f"{name}_backward", back, len(differentiable), self._gradients, self._fake_gradients
        )
        torch.library.register_autograd(f"gatelet::{name}", self._traced_backprop, setup_context=self._setup)
        self._recorded = _recorded(self)

    def __call__(self, given: Any, ordinary: bool = False) -> Tensor:
        """Run the op. ``ordinary`` says that :func:`plain` was true of its tensors; it must be if nothing is kept."""
        if (ordinary or not given.keep) and forward_ad._current_level < 0:
            found: Tensor = self._recorded(*given) if given.keep else self.forward(given)[0]
            return found
        tensors = given_tensors(given)
        if transformed(*tensors):
            if given.backend not in ("auto", "dense"):
                raise NotImplementedError(
                    f'{self.name}: backend="{given.backend}" has no torch.func transforms and no forward-mode '
                    'derivative; "auto" and "dense" have them'
                )
            return self.naive(given)
        if plain(*tensors):
            found = self.forward(given)[0] if not given.keep else self._recorded(*given)
            return found
        flat = [_tensors(each) if index in self.forms else each for index, each in enumerate(given)]
        found = self._traced(*flat)
        return found if isinstance(found, Tensor) else found[0]

    # ---------------------------------------------------------------- what torch.library calls

    @staticmethod
    def _declare(name: str, arguments: str, results: int, run: Any, fake: Any) -> Any:
        def whole(call: Any) -> Any:
            # A schema has no tuples of one.
            return (lambda *args: call(*args)[0]) if results == 1 else call

        schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"
        made = torch.library.custom_op(f"gatelet::{name}", whole(run), mutates_args=(), schema=schema)
        made.register_fake(whole(fake))
        return getattr(torch.ops.gatelet, name)

    def _given(self, args: tuple[Any, ...]) -> Any:
        return self.given(*(form_of(each) if index in self.forms else each for index, each in enumerate(args)))

    def _forward(self, *args: Any) -> tuple[Tensor, ...]:
        return tuple(each.contiguous() for each in self.forward(self._given(args)))

    def _fake(self, *args: Any) -> tuple[Tensor, ...]:
        like = args[self.places[0]]
        return tuple(like.new_empty(shape) for shape in self.shapes(self._given(args)))

    def _gradients(self, grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *args, kept, need = args  # type: ignore[assignment]
        found = self.backward(grad, self._given(tuple(args)), tuple(kept), tuple(need))
        # A fake tensor has one layout.
        return tuple(grad.new_empty(0) if each is None else each.contiguous() for each in found)

    def _fake_gradients(self, grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        need = args[-1]
        pairs = zip(self.places, need, strict=True)
        return tuple(grad.new_empty(args[place].shape if wanted else (0,)) for place, wanted in pairs)

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = () if isinstance(output, Tensor) else output[1:]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # zeros in place of missing gradients would be as large as the output
        _save(ctx, self, inputs, kept)

    def _traced_backprop(self, ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * self.count
        given, kept, need = _saved(ctx, self)
        if torch.is_grad_enabled():
            found = self.second_order(grad, self._given(tuple(given)), need)
        else:
            found = self._traced_backward(grad, *given, list(kept), list(need))
        placed = self._placed(found, need)
        # The gradient of a list of tensors is a list.
        return tuple([None] * len(given[index]) if index in self.forms else each for index, each in enumerate(placed))

    def _placed(self, found: tuple[Tensor | None, ...], need: tuple[bool, ...]) -> tuple[Any, ...]:
        """Return the gradients at the places of their arguments, None for the others."""
        placed: list[Any] = [None] * self.count
        for place, each, wanted in zip(self.places, found, need, strict=True):
            placed[place] = each if wanted else None
        return tuple(placed)

    def second_order(self, grad: Tensor, given: Any, need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Return the gradients as functions that autograd differentiates again: those of the naive version."""
        with torch.enable_grad():
            # Views replace the arguments, so that an argument that was computed from another one counts only as itself.
            fields = list(given)
            views: list[Tensor | None] = []
            for place, wanted in zip(self.places, need, strict=True):
                if wanted:
                    fields[place] = fields[place].view_as(fields[place])
                views.append(fields[place] if wanted else None)
            wanted_views = [each for each in views if each is not None]
            out = self.naive(self.given(*fields))
            found = iter(torch.autograd.grad(out, wanted_views, grad, create_graph=True))
        return tuple(None if each is None else next(found) for each in views)


def given_tensors(given: Any) -> list[Tensor | None]:
    """Return the tensors among the arguments of an op, without those of patterns."""
    return [each for each in given if each is None or isinstance(each, Tensor)]


def _tensors(form: Form | None) -> list[Tensor]:
    return [] if form is None else form.tensors()


def _save(ctx: Any, op: Op, inputs: tuple[Any, ...], kept: tuple[Tensor, ...]) -> None:
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    ctx.save_for_backward(*tensors, *kept)
    ctx.rest = [None if isinstance(each, Tensor) else each for each in inputs]
    ctx.tensors = [isinstance(each, Tensor) for each in inputs]


def _saved(ctx: Any, op: Op) -> tuple[list[Any], tuple[Tensor, ...], tuple[bool, ...]]:
    tensors = iter(ctx.saved_tensors)
    given = [next(tensors) if here else other for here, other in zip(ctx.tensors, ctx.rest, strict=True)]
    return given, tuple(tensors), tuple(ctx.needs_input_grad[place] for place in op.places)


def _recorded(op: Op) -> Any:
    """Return the op's autograd for ordinary tensors: what torch.library would do, at a quarter of its cost per call."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output, *kept = op.forward(op.given(*inputs))
            ctx.set_materialize_grads(False)
            _save(ctx, op, inputs, tuple(kept))
            return output

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> Any:
            if grad is None:
                return (None,) * op.count
            fields, kept, need = _saved(ctx, op)
            given = op.given(*fields)
            if torch.is_grad_enabled():
                found = op.second_order(grad, given, need)
            elif plain(grad):
                found = op.backward(grad, given, kept, need)
            else:
                flat = [_tensors(each) if index in op.forms else each for index, each in enumerate(fields)]
                found = op._traced_backward(grad, *flat, list(kept), list(need))
            return op._placed(found, need)

    return Recorded.apply
