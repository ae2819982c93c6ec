"""StatisticalTopK: against its formula, against a sort, and in layers."""

import pytest
import torch
from scipy.stats import norm

import gatelet
from gatelet.sparsity import StatisticalTopK, calibrate_thresholds


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.8])
def test_the_threshold_is_the_formula(rate):
    logits = torch.randn(4, 3, 50, dtype=torch.float64)
    threshold = logits.mean(-1) + logits.std(-1, correction=0) * norm.ppf(1 - rate)
    torch.testing.assert_close(StatisticalTopK(rate).shift(logits), logits - threshold.unsqueeze(-1))


def test_as_a_sort_would_for_gaussian_logits():
    torch.manual_seed(0)
    logits = torch.randn(20, 20_000) * torch.rand(20, 1) + torch.randn(20, 1)
    count = (StatisticalTopK(0.08).shift(logits) > 0).sum(-1)
    assert bool(((count - 1600).abs() < 5 * (20_000 * 0.08 * 0.92) ** 0.5).all())


def test_the_gradient_is_that_of_the_whole_formula():
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(StatisticalTopK(0.2).shift, logits)


@pytest.mark.parametrize(("gater", "within"), [("mlp", 0.03), ("self", 0.08)])  # |activations| are no Gaussian
def test_every_token_opens_about_as_many(gater, within):
    torch.manual_seed(0)
    options = {"bottleneck": 8, "target_rate": 0.2, "gater": gater}
    x = torch.randn(200, 32) * torch.logspace(-1, 0.5, 200).unsqueeze(-1)  # tokens of very different sizes
    spread = {}
    for name, sparsity in (("held", [StatisticalTopK(0.2)]), ("free", [])):
        torch.manual_seed(1)
        layer = gatelet.nn.ConditionalFFN(32, 512, **options, activation="gelu", sparsity=sparsity).eval()
        assert calibrate_thresholds(layer, [x])["unit"] == pytest.approx(0.2, abs=1e-3)
        gates = []
        layer.unit.register_forward_hook(lambda *args, gates=gates: gates.append(args[2]))
        layer(x)
        spread[name] = (gates[0] != 0).float().mean(-1).std().item()
    assert spread["held"] < 0.5 * spread["free"]
    assert spread["held"] < within


@pytest.mark.parametrize("bad", [0.0, 1.0, -1.0])
def test_rates_outside_are_refused(bad):
    with pytest.raises(ValueError, match="target_rate must lie strictly between 0 and 1"):
        StatisticalTopK(bad)
