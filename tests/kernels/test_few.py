"""A few float32 examples take kernels of their own, forward and backward; against the dense definition in float64."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from gatelet.kernels import gated_ffn, gated_linear, open_pattern
from gatelet.kernels.ops import _declare

pytest.importorskip("numba")
from gatelet.kernels.backends.numba import few_kernels, narrow, products

SIZES = [(1, 40, 130, 20), (2, 16, 64, 16), (7, 33, 100, 70), (19, 64, 200, 5), (32, 70, 129, 33)]
"""B, D, N, O: units that fill no block, rows that fill no vector, and more examples than are summed at once."""
ACTIVATIONS = {"identity": lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class Layer:
    """A random layer whose first units are closed for all examples."""

    def __init__(self, batch: int, width: int, units: int, outputs: int, rate: float) -> None:
        draw = torch.Generator().manual_seed(batch + units)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw).requires_grad_()

        self.x, self.w1, self.b1 = tensor(batch, width), tensor(units, width), tensor(units)
        self.w2, self.b2 = tensor(units, outputs), tensor(outputs)
        with torch.no_grad():
            gate = torch.randn(batch, units, generator=draw) * (torch.rand(batch, units, generator=draw) < rate)
            gate[:, :5] = 0
        self.gate = gate.requires_grad_()
        self.upper = torch.randn(batch, units, generator=draw)
        self.upper2 = torch.randn(batch, outputs, generator=draw)

    def linear(self) -> torch.Tensor:
        return gated_linear(self.x, self.w1, self.b1, self.gate, backend="numba")

    def ffn(self, activation: str, by_unit: bool = True) -> torch.Tensor:
        w2 = self.w2 if by_unit else self.w2.t()
        args = (self.x, self.w1, self.b1, self.gate, activation, w2, self.b2)
        return gated_ffn(*args, by_unit=by_unit, backend="numba")


def gradients(out: torch.Tensor, upper: torch.Tensor, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(out, wanted, upper))


def close(found: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=2e-5, atol=2e-5 * max(float(other.detach().abs().max()), 1.0)
        )


def masked(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.where(gate != 0, value * gate, 0)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the kernels for few examples that ran."""
    ran: list[str] = []
    for kernels in (narrow.few, narrow.few_gradients):

        def noted(name: str, *rest: int, run=kernels.run, **args: int) -> None:  # type: ignore[no-untyped-def]
            ran.append(name)
            run(name, *rest, **args)

        monkeypatch.setattr(kernels, "run", noted)
    return ran


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_linear(sizes: tuple[int, ...], streamed: bool, passes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "STREAMED", 0 if streamed else 1 << 60)
    monkeypatch.setattr(products, "CROWD_TO_LEARN", 64)
    own = Layer(*sizes, rate=0.5)
    wanted = [own.x, own.w1, own.b1, own.gate]
    out = own.linear()
    found = [out, *gradients(out, own.upper, wanted)]
    assert passes == ["linear", "gradients"]
    x, w1, b1, gate = (each.detach().double().requires_grad_() for each in wanted)
    truth = masked(gate, F.linear(x, w1, b1))
    slopes = gradients(truth, own.upper.double(), [x, w1, b1, gate])
    close(found, [truth, *slopes[:3], torch.where(gate != 0, slopes[3], 0)])


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("sizes", SIZES)
def test_ffn(sizes: tuple[int, ...], activation: str, passes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CROWD_TO_LEARN", 64)
    monkeypatch.setattr(narrow, "STREAMED", 0)
    own = Layer(*sizes, rate=0.4)
    wanted = [own.x, own.w1, own.b1, own.gate, own.w2, own.b2]
    out = own.ffn(activation, by_unit=activation != "relu")
    found = [out, *gradients(out, own.upper2, wanted)]
    assert passes == ["linear", "ffn", "gradients"]
    x, w1, b1, gate, w2, b2 = (each.detach().double().requires_grad_() for each in wanted)
    truth = masked(gate, ACTIVATIONS[activation](F.linear(x, w1, b1))) @ w2 + b2
    slopes = gradients(truth, own.upper2.double(), [x, w1, b1, gate, w2, b2])
    slopes[3] = torch.where(gate != 0, slopes[3], 0)
    close(found, [truth, *slopes])


def test_only_what_is_needed() -> None:
    own = Layer(6, 40, 100, 20, rate=0.3)
    everything = [own.x, own.w1, own.b1, own.gate]
    both = [*everything, own.w2]
    truth, truth2 = gradients(own.linear(), own.upper, everything), gradients(own.ffn("relu"), own.upper2, both)
    for wanted in itertools.chain.from_iterable(itertools.combinations(range(5), k) for k in (1, 2, 4)):
        for op, upper, among, expected in (
            (own.linear, own.upper, everything, truth),
            (lambda: own.ffn("relu"), own.upper2, both, truth2),
        ):
            some = [index for index in wanted if index < len(among)]
            for index, each in enumerate(both):
                each.requires_grad_(index in some)
            if some:
                found = gradients(op(), upper, [among[index] for index in some])
                for index, each in zip(some, found, strict=True):
                    assert torch.equal(each, expected[index])
    for each in both:
        each.requires_grad_()


def test_what_is_closed_is_not_read() -> None:
    own = Layer(9, 40, 130, 20, rate=0.3)
    wanted = [own.x, own.w1, own.b1, own.gate, own.w2]
    truth = [own.ffn("silu"), *gradients(own.ffn("silu"), own.upper2, wanted)]
    closed = (own.gate == 0).all(0)
    assert closed.sum() >= 5
    with torch.no_grad():
        own.w1[closed], own.b1[closed], own.w2[closed] = float("nan"), float("nan"), float("nan")
    found = [own.ffn("silu"), *gradients(own.ffn("silu"), own.upper2, wanted)]
    assert all(torch.equal(one, other) for one, other in zip(found, truth, strict=True))


def test_hidden_units_that_are_zero_are_open_all_the_same() -> None:
    own = Layer(4, 40, 64, 20, rate=0.5)
    with torch.no_grad():
        own.b1.fill_(-1e6)  # ReLU gives zeros
        own.w2.fill_(float("nan"))
    is_open = (own.gate != 0).any(1)
    assert own.ffn("relu").isnan().all(1)[is_open].all()


@pytest.mark.parametrize("op", ["linear", "ffn"])
def test_threads_change_no_bit(op: str) -> None:
    own = Layer(8, 64, 500, 32, rate=0.2)
    run, upper = (own.linear, own.upper) if op == "linear" else (lambda: own.ffn("gelu"), own.upper2)
    wanted = [own.x, own.w1, own.gate]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = run()
            found.append([out, *gradients(out, upper, wanted)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_crowded_units_take_the_other_kernels(passes: list[str]) -> None:
    sparse, crowded = Layer(32, 64, 256, 20, rate=0.1), Layer(32, 64, 256, 20, rate=0.9)
    for own in (sparse, crowded):
        wanted = [own.x, own.w1, own.gate, own.w2]
        passes.clear()
        out = own.ffn("relu")
        found = gradients(out, own.upper2, wanted)
        assert ("gradients" in passes) == (own is sparse)
        x, w1, gate, w2 = (each.detach().double().requires_grad_() for each in wanted)
        truth = masked(gate, F.relu(F.linear(x, w1, own.b1.double()))) @ w2 + own.b2.double()
        slopes = gradients(truth, own.upper2.double(), [x, w1, gate, w2])
        slopes[2] = torch.where(gate != 0, slopes[2], 0)
        close([out, *found], [truth, *slopes])


def test_a_pattern_that_was_built_before_is_read(passes: list[str]) -> None:
    own = Layer(8, 64, 256, 20, rate=0.2)
    out = gated_linear(own.x, own.w1, own.b1, own.gate, pattern=open_pattern(own.gate.detach()), backend="numba")
    assert "linear" not in passes
    torch.testing.assert_close(out, own.linear(), rtol=1e-5, atol=1e-5)


def test_gradients_of_gradients_and_traced_ones_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Layer(6, 16, 70, 10, rate=0.3)
    wanted = [own.x, own.w1, own.w2]
    truth = gradients(own.ffn("silu"), own.upper2, wanted)
    out = own.ffn("silu")
    for one, other in zip(torch.autograd.grad(out, wanted, own.upper2, create_graph=True), truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    out = own.ffn("silu")
    monkeypatch.setattr(_declare, "plain", lambda *tensors: False)  # as if the gradient were traced
    for one, other in zip(gradients(out, own.upper2, wanted), truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_examples_fill_a_word() -> None:
    own = Layer(few_kernels.EXAMPLES, 32, 130, 10, rate=0.2)
    with torch.no_grad():
        found = narrow.linear(own.x, own.w1, own.b1, own.gate)
        truth = masked(own.gate.double(), F.linear(own.x.double(), own.w1.double(), own.b1.double()))
    close([found], [truth])
