"""spread_rate: more open where the output suffers more, the mean as asked for, nothing of the model changed."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import gatelet
from gatelet.convert import blocks, spread_rate
from gatelet.convert.spread import LEAST


def net(weights=(1.0, 1.0, 1.0)):
    """Three blocks of equal shape, each added to what comes, times a weight."""
    torch.manual_seed(0)
    return Residual(weights)


class Residual(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in weights)
        self.out = nn.Linear(16, 10)

    def forward(self, x):
        for weight, part in zip(self.weights, self.parts, strict=True):
            x = x + weight * part(x)
        return self.out(x)


BATCHES = [torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def divergence(model, dense, x):
    return float(F.kl_div(model(x).log_softmax(-1), dense(x).log_softmax(-1), reduction="batchmean", log_target=True))


def closed(rates):
    """The net with the cheapest units of each block closed, by a gater that knows what they cost."""
    model = net((0.1, 1.0, 3.0))
    gatelet.convert(model, rates, gater="self")
    gatelet.distil(model, net((0.1, 1.0, 3.0)), BATCHES, steps=1, held_out=1, calibration=2, progress=False)
    return model.eval()


def test_more_is_open_where_the_output_suffers_more():
    rates = spread_rate(net((0.1, 1.0, 3.0)), BATCHES, 0.3, progress=False)
    assert list(rates) == ["parts.0.0", "parts.1.0", "parts.2.0"]
    assert rates["parts.0.0"] < rates["parts.1.0"] < rates["parts.2.0"]
    assert sum(rates.values()) / 3 == pytest.approx(0.3, abs=0.005)


def test_the_output_suffers_less_than_with_equal_rates():
    dense, x = net((0.1, 1.0, 3.0)).eval(), torch.cat(BATCHES)
    spread = spread_rate(dense, BATCHES, 0.3, progress=False)
    with torch.no_grad():
        assert divergence(closed(spread), dense, x) < 0.7 * divergence(closed(0.3), dense, x)


def test_the_model_stays_what_it_was():
    model = net().train()
    model.parts[1].eval()
    want, modes = model(BATCHES[0]), [module.training for module in model.modules()]
    spread_rate(model, BATCHES, 0.5, progress=False)
    assert torch.equal(model(BATCHES[0]), want)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_language_model():
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
    rates = spread_rate(model, [torch.randint(50, (2, 12))], 0.4, progress=False)
    assert sum(rates.values()) / 2 == pytest.approx(0.4, abs=0.01)
    gatelet.convert(model, rates, gater="preview")
    assert {name: gating.unit.target_rate for name, (_, gating) in blocks(model).items()} == {
        f"{name}.gating": rate for name, rate in rates.items()
    }


def test_rates_are_saved_and_loaded(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
    gatelet.convert(model, {"model.layers.0.mlp": 0.3, "model.layers.1.mlp": 0.6}, gater="preview")
    gatelet.sparsity.calibrate_thresholds(model, [torch.randint(50, (2, 12))])
    gatelet.save(model, tmp_path)
    again = blocks(gatelet.load(tmp_path))
    assert [gating.unit.target_rate for _, gating in again.values()] == [0.3, 0.6]


def test_bad_input():
    with pytest.raises(ValueError, match=r"target_rate must lie between 0\.05 and 0\.98"):
        spread_rate(net(), BATCHES, LEAST / 2)
    with pytest.raises(ValueError, match="loader: must allow several passes"):
        spread_rate(net(), iter(BATCHES), 0.5)
    with pytest.raises(ValueError, match=r"loader: no batch reaches the block parts\.0\.0"):
        spread_rate(net(), [], 0.5)
    with pytest.raises(ValueError, match="model: has no feed-forward block"):
        spread_rate(nn.Linear(3, 3), BATCHES, 0.5)
    model = net()
    gatelet.convert(model, 0.5, gater="self")
    with pytest.raises(ValueError, match="model: holds converted blocks"):
        spread_rate(model, BATCHES, 0.5)


@pytest.mark.parametrize(
    ("rates", "where", "said"),
    [
        ({"parts.0.0": 0.5, "parts.1.0": 0.5}, None, "target_rate: has no rate for the block 'parts.2.0'"),
        ({"parts.7": 0.5}, None, "target_rate: the model has no block 'parts.7'; it has parts.0"),
        ({"parts.0.0": 1.5}, "parts.0.0", "target_rate must lie strictly between 0 and 1, not 1.5"),
    ],
)
def test_rates_that_do_not_fit_the_model_change_nothing(rates, where, said):
    model = net()
    with pytest.raises(ValueError, match=said):
        gatelet.convert(model, rates, gater="self", where=where)
    assert not blocks(model)


def test_rates_of_chosen_blocks_alone():
    model = net()
    gatelet.convert(model, {"parts.1.0": 0.3}, gater="self", where="parts.1*")
    assert [gating.unit.target_rate for _, gating in blocks(model).values()] == [0.3]
