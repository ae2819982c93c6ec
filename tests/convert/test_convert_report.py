"""report: what it counts, computes, measures and prints."""

import copy
import time

import pytest
import torch
from torch import nn

import gatelet
from gatelet.nn import ConditionalFFN, ConditionalLayer, ConditionalLinear


def model():
    net = nn.Sequential(
        ConditionalLinear(8, 32, 4, group_size=4), ConditionalFFN(32, 64, 4, gated=True), nn.Linear(32, 64)
    )
    net.append(nn.ReLU())
    net.append(nn.Linear(64, 8))
    gatelet.convert(net, bottleneck=2)
    for layer in (net[0], net[1], net[2].gating):
        bias = layer.gater.gates.bias.data
        layer.gater.gates.weight.data.zero_()
        bias.fill_(-1.0)
        bias[: len(bias) // 4] = 1.0
        layer.unit.threshold.fill_(0.0)
    return net.eval()


def test_rows():
    net = model()
    with torch.no_grad():
        net(torch.randn(5, 2, 8))
    found = gatelet.report(net)
    assert [row.name for row in found.layers] == ["0", "1", "2.gating"]
    linear, gated, block = found.layers
    assert (linear.units, linear.groups, linear.tokens) == (32, 8, 10)
    for row, groups in zip(found.layers, (8, 64, 64), strict=True):
        assert row.open_share == 0.25
        assert row.always == groups // 4
        assert row.dead == groups - groups // 4
        assert row.flops_active == row.flops_dense / 4
        assert row.speed_up is None
    assert linear.flops_dense == 2 * 8 * 32
    assert gated.flops_dense == 2 * 32 * 64 * 3
    assert block.flops_dense == 2 * 64 * (32 + 8)
    assert linear.flops_gater == 2 * 4 * (8 + 8)
    assert gated.flops_gater == 2 * 4 * (32 + 64)
    assert found["1"] is gated
    assert repr(found).splitlines()[0].split()[:3] == ["layer", "units", "open"]
    assert "8 × 4" in repr(found)
    total = linear.flops_dense + gated.flops_dense + block.flops_dense
    gaters = linear.flops_gater + gated.flops_gater + block.flops_gater
    spent = total / 4 + gaters
    last = f"together {spent / 1e3:,.0f} of {total / 1e3:,.0f} kFLOPs per token, {spent / total:.1%}"
    assert repr(found).splitlines()[-1] == last


def test_nothing_counted():
    found = gatelet.report(model())
    assert all(row.open_share is None and row.dead is None for row in found.layers)
    assert repr(found).endswith("– : nothing counted yet; run the model, or give report(model, *inputs)")


def test_with_an_input_it_measures_and_changes_nothing():
    net, x = model(), torch.randn(5, 8)
    before = copy.deepcopy(net.state_dict())
    found = gatelet.report(net, x, seconds=0.01)
    assert all(row.tokens == 5 and row.ms > 0 and row.dense_ms > 0 for row in found.layers)
    assert found.layers[0].speed_up == found.layers[0].dense_ms / found.layers[0].ms
    assert "speed-up" in repr(found)
    assert int(net[0].tokens) == 5
    assert not any(layer.fully_open for layer in (net[0], net[1], net[2].gating))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net[0].gater._forward_pre_hooks


def test_what_is_timed_is_the_layer_with_and_without_its_gates(monkeypatch):
    def gates(self, x, *args, plain=ConditionalLayer.decide_unpadded):
        time.sleep(0.001 if self.fully_open else 0.1)  # far apart: a busy machine is no failure
        return plain(self, x, *args)

    monkeypatch.setattr(ConditionalLayer, "decide_unpadded", gates)
    net = model()
    for row in gatelet.report(net, torch.randn(5, 8), seconds=0.01).layers:
        assert row.dense_ms < 100 <= row.ms


def test_no_layers():
    with pytest.raises(ValueError, match="model: holds no conditional layer"):
        gatelet.report(nn.Linear(2, 2))


def test_open_for_some_is_neither_dead_nor_always_open():
    net = model()
    bias = net[0].gater.gates.bias.data
    for last in (-1.0, 1.0):
        bias[-1] = last
        net(torch.randn(3, 8))
    row = gatelet.report(net)["0"]
    assert (row.always, row.dead, row.tokens) == (2, 5, 6)
    assert row.open_share == (2 * 6 + 3) / (8 * 6)
