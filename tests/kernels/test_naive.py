"""Every backend of the registry is each op's naive version, forward and backward."""

import importlib

import pytest
import torch

from gatelet.kernels import OpenPattern, open_pattern
from gatelet.kernels.backends import BACKENDS
from gatelet.kernels.ops import _declare

OPS = ["gated_linear", "gated_input_linear", "gated_ffn"]


def given(name, backend, lists):
    """An op's declaration and its arguments."""
    module = importlib.import_module(f"gatelet.kernels.ops.{name}")
    draw = torch.Generator().manual_seed(3)

    def tensor(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    batch, units, width, outputs = 5, 12, 6, 4
    gate = tensor(batch, units).detach()
    gate[gate.abs() < 0.7] = 0
    indices = torch.tensor([[0, 3, 11], [1, 2, 5], [0, 4, 6], [3, 7, 8], [2, 9, 10]])
    form = OpenPattern.from_indices(indices, units).form if lists else open_pattern(gate).form
    values = tensor(15) if lists else gate.requires_grad_()
    hidden = tensor(15) if lists else tensor(batch, units)
    fields = {
        "x": tensor(batch, width),
        **{"weight": tensor(outputs, units) if name == "gated_input_linear" else tensor(units, width)},
        **{"bias": tensor(outputs) if name == "gated_input_linear" else tensor(units)},
        **{"gate": values, "hidden": hidden, "pattern": form, "wide": None, "activation": "silu"},
        **{"w1": tensor(units, width), "b1": tensor(units), "w2": tensor(outputs, units), "b2": tensor(outputs)},
        **{"by_unit": False, "sparse_grad": False, "backend": backend, "keep": True},
    }
    return module._op, module.Given(*(fields[field] for field in module.Given._fields))


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_backend_is_the_naive_version(backend, op, lists):
    declared, arguments = given(op, backend, lists)
    wanted = [arguments[place] for place in declared.places]

    def run(call):
        out = call(arguments)
        return [out, *torch.autograd.grad(out.sin().sum(), wanted)]

    for have, want in zip(run(declared), run(declared.naive), strict=True):
        torch.testing.assert_close(have, want)


def test_every_op_is_walked():
    made = {name for name in dir(torch.ops.gatelet) if f"{name}_backward" in dir(torch.ops.gatelet)}
    assert made == set(OPS)
    assert _declare.Op is type(given(OPS[0], "dense", False)[0])
