"""Few tokens through a conditional feed-forward layer and its gater in one kernel: what the long way gives."""

import copy
import pickle

import pytest
import torch

from gatelet.kernels.backends import BACKENDS
from gatelet.nn import ConditionalFFN, _one_pass
from gatelet.sparsity import calibrate_thresholds

pytestmark = pytest.mark.skipif(BACKENDS["numba"].missing() is not None, reason="without Numba there is no such kernel")


CALLS: list[bool] = []


def layer_of(width: int = 24, units: int = 150, middle: int = 5, **options: object) -> ConditionalFFN:
    torch.manual_seed(1)
    layer = ConditionalFFN(width, units, middle, target_rate=0.3, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    calibrate_thresholds(layer, [torch.randn(200, width)])
    CALLS.clear()
    return layer.eval()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a layer went through the kernel."""
    whole = _one_pass.one_pass

    def noting(*args: object) -> object:
        found = whole(*args)
        CALLS.append(found is not None)
        return found

    monkeypatch.setattr("gatelet.nn.conditional_ffn.one_pass", noting)
    return CALLS


def long_way(layer: ConditionalFFN, x: torch.Tensor) -> torch.Tensor:
    """The same through torch: a forward hook on the gater keeps the kernel away."""
    hook = layer.gater.register_forward_hook(lambda *_: None)
    try:
        return layer(x)
    finally:
        hook.remove()


@pytest.mark.parametrize("tokens", [(), (1,), (2, 1), (4,)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"activation": "relu"},
        {"gated": True, "activation": "silu"},
        {"gated": True, "bias": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_gives_what_the_long_way_gives(taken: list[bool], options: dict[str, object], tokens: tuple[int, ...]) -> None:
    layer = layer_of(**options)
    x = torch.randn(*tokens, 24)
    found, share, opened = layer(x), layer.active_fraction, layer.opened.clone()
    assert taken == [True]
    expected = long_way(layer, x)
    assert taken == [True, False]
    torch.testing.assert_close(found, expected)
    assert share == layer.active_fraction
    assert 0 < share < 1
    assert torch.equal(layer.opened, 2 * opened)
    assert layer.tokens == 2 * max(1, x[..., 0].numel())


@torch.no_grad()
def test_any_number_of_threads_gives_the_same_bits() -> None:
    layer, before = layer_of(width=256, units=1111, middle=33), torch.get_num_threads()
    x = torch.randn(1, 256)
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["up.weight", "up.bias", "down.weight", "down.bias", "gater.gates.bias"])
@pytest.mark.parametrize("way", ["in place", "data", "replaced", "data in place"])
@torch.no_grad()
def test_changed_weights_are_read(taken: list[bool], name: str, way: str) -> None:
    layer, x = layer_of(), torch.randn(1, 24)
    layer(x)
    owner, _, last = name.rpartition(".")
    module = layer.get_submodule(owner)
    parameter = getattr(module, last)
    changed = parameter + torch.randn_like(parameter)
    if way == "in place":
        parameter.copy_(changed)
    elif way == "data":
        parameter.data = changed
    elif way == "data in place":
        parameter.data.copy_(changed)
    else:
        setattr(module, last, torch.nn.Parameter(changed))
    found = layer(x)
    torch.testing.assert_close(found, long_way(layer, x))
    torch.testing.assert_close(layer(x), found)
    assert taken[-1]  # where a copy of W2 was out of date, that call went the long way


@torch.no_grad()
def test_another_threshold_is_read(taken: list[bool]) -> None:
    layer, x = layer_of(), torch.randn(1, 24)
    layer(x)
    layer.unit.threshold = torch.tensor(-1e9)
    layer(x)
    assert layer.active_fraction == 1
    layer.unit.threshold.fill_(1e9)
    layer(x)
    assert layer.active_fraction == 0
    assert taken == [True] * 3


@torch.no_grad()
def test_threshold_and_input_are_looked_at(taken: list[bool]) -> None:
    layer, x = layer_of(), torch.randn(2, 24)
    layer(x)
    opened = layer.opened.clone()
    x[1, 3] = float("inf")
    with pytest.raises(ValueError, match="x holds 1 values"):
        layer(x)
    assert torch.equal(layer.opened, opened)
    layer.unit.threshold.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="no test-time threshold"):
        layer(x[:1])
    assert taken == [True, False, False]


@pytest.mark.filterwarnings("ignore:gatelet.nn. a Linear")
@torch.no_grad()
def test_who_listens_is_heard_and_training_is_not_touched(taken: list[bool]) -> None:
    layer, x, heard = layer_of(), torch.randn(1, 24), []
    for module in (layer.gater, layer.unit, layer.gater.hidden, layer.up):
        hook = module.register_forward_hook(lambda *_: heard.append(1))
        layer(x)
        hook.remove()
    assert len(heard) == 4
    layer(x, mask=torch.tensor([True]))
    layer(torch.randn(5, 24))  # too many
    layer.double()(x.double())
    assert not any(taken)
    layer.float()(x)
    with torch.enable_grad():
        assert layer(x).requires_grad
    assert taken[-2:] == [True, False]


@torch.no_grad()
def test_layers_with_packed_arguments_are_copied_and_pickled() -> None:
    layer, x = layer_of(), torch.randn(1, 24)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        layer.up.weight.add_(1)  # not the copy's
        torch.testing.assert_close(other(x), expected)
        layer.up.weight.sub_(1)
