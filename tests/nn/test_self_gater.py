"""gater="self" and "preview": the layer's own numbers say which units are open; the others' rows are not read."""

import copy

import pytest
import torch
import transformers
from jaxtyping import config
from torch import nn
from torch.nn import functional as F

import gatelet
from gatelet.convert import blocks
from gatelet.nn import ConditionalFFN, PreviewGater
from gatelet.sparsity import calibrate_thresholds

OWN = pytest.mark.parametrize("gater", ["self", "preview"])


def layer(gated=True, rate=0.25, gater="self", **options):
    torch.manual_seed(0)
    made = ConditionalFFN(16, 64, 8, activation="silu", gated=gated, target_rate=rate, gater=gater, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def by_hand(made, x):
    """The formula, densely."""
    first = F.silu(F.linear(x, *((made.up if made.glu is None else made.glu).parameters())))
    hidden = first if made.glu is None else first * made.up(x)
    seen = hidden if type(made.gater) is PreviewGater else first
    hidden = hidden * (seen.abs() * made.gater.scale > made.unit.threshold)
    return F.linear(hidden, *made.down.parameters())


@OWN
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_value_and_gradients(gated, training, gater):
    made, x = layer(gated, gater=gater).double(), torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    found = calibrate_thresholds(made, [x])
    assert found == {"unit": pytest.approx(0.25, abs=1e-3)}
    made.gater.scale.uniform_(0.5, 2.0)
    made.train(training)
    weights = [p for p in made.parameters() if p.requires_grad]
    have, want = made(x), by_hand(made, x)
    torch.testing.assert_close(have, want)
    direction = torch.randn_like(want)
    for one, two in zip(
        torch.autograd.grad((have * direction).sum(), [x, *weights]),
        torch.autograd.grad((want * direction).sum(), [x, *weights]),
        strict=True,
    ):
        torch.testing.assert_close(one, two)
    assert 0 < made.active_fraction < 1


@OWN
def test_closed_units_are_not_read(gater):
    made, x = layer(gater=gater).eval(), torch.randn(1, 16)
    calibrate_thresholds(made, [torch.randn(50, 16)])
    with torch.no_grad():
        want = made(x)
        closed = made.opened == 0
        if gater == "self":
            made.up.weight[closed] = torch.nan
        made.down.weight[:, closed] = torch.nan
        torch.testing.assert_close(made(x), want)


def test_padding_has_closed_gates():
    made, x = layer().eval(), torch.randn(2, 3, 16)
    calibrate_thresholds(made, [x])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    out = made(x, mask=mask)
    torch.testing.assert_close(out[~mask], made.down.bias.expand(3, 16))
    torch.testing.assert_close(out[mask], made(x)[mask])


def test_open_gates_are_the_dense_layer():
    made, x = layer(), torch.randn(4, 16)
    with gatelet.nn.fully_open(made):
        want = F.linear(F.silu(made.glu(x)) * made.up(x), *made.down.parameters())
        torch.testing.assert_close(made(x), want)


@pytest.mark.cpu
def test_no_threshold_no_gates():
    with pytest.raises(RuntimeError, match="no test-time threshold yet"):
        layer()(torch.randn(4, 16))


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="group_size must be 1 with gater='self'"):
        layer(group_size=2)
    with pytest.raises(ValueError, match="target_rate: gater='self' needs one"):
        layer(rate=None)


@pytest.fixture
def as_user():
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@OWN
@pytest.mark.usefixtures("as_user")
def test_compiles(gater):
    made, x = layer(gater=gater).eval(), torch.randn(4, 16)
    calibrate_thresholds(made, [x])
    with torch.no_grad():
        want = made(x)
        torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), want)


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)).eval()


@pytest.mark.parametrize(("gater", "maps"), [("self", 1), ("preview", 2)])
def test_a_converted_model_is_calibrated_by_distil_and_reported_with_the_maps_that_are_computed_in_full(gater, maps):
    teacher, model = llama(), llama()
    gatelet.convert(model, target_rate=0.4, gater=gater)
    loader = list(torch.randint(50, (6, 4, 20), generator=torch.Generator().manual_seed(1)))
    found = gatelet.distil(model, teacher, loader, held_out=2, steps=3)
    assert found.steps == 0
    assert list(found.open_share.values()) == pytest.approx([0.4] * 3, abs=0.02)
    for name in found.errors:  # the scale, where it was better
        assert found.errors[name] <= found.first_errors[name]
    assert any(bool((gating.gater.scale != 1).any()) for _, gating in blocks(model).values())
    row = gatelet.report(model).layers[0]
    share = row.open_share
    assert (row.flops_dense, row.flops_gater) == (6 * 32 * 96, 2 * maps * 32 * 96)
    assert row.flops_active == pytest.approx(share * (6 - 2 * maps) * 32 * 96)


def test_weights_learn_with_the_gates_of_the_activation():
    teacher, model = llama(), llama()
    gatelet.convert(model, target_rate=0.3, gater="self")
    loader = list(torch.randint(50, (12, 4, 20), generator=torch.Generator().manual_seed(1)))
    kept = copy.deepcopy(model)
    gatelet.distil(kept, teacher, loader, held_out=2, steps=1)
    found = gatelet.distil(model, teacher, loader, held_out=2, steps=60, every=20, weights=True, weights_lr=3e-3)
    assert sum(found.errors.values()) < 0.8 * sum(found.first_errors.values())
