"""convert(batch=...): each block is timed, and the model's state does not change."""

import importlib

import pytest
import torch
import transformers
from torch import nn

import gatelet
from gatelet.convert import blocks, swap
from gatelet.convert.block_times import BlockTimes

block_times, report = (importlib.import_module(f"gatelet.convert.{name}") for name in ("block_times", "report"))


def model():
    return nn.Sequential(*[part for _ in range(3) for part in (nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))])


def test_words():
    assert str(BlockTimes(1, 2.0, 1.0)) == "1.000 ms for 1 token, dense 2.000"
    assert str(BlockTimes(32, 2.0, 1.95)) == "1.950 ms for 32 tokens, dense 2.000: saves no time"
    kept = str(BlockTimes(1, 2.0, 2.5, 1.2, 0.8))
    assert kept == ("2.500 ms for 1 token, dense 2.000: saves no time; with keep_rows 0.800, all units open 1.200")
    assert str(BlockTimes(1, 2.0, 2.5, 1.2, 1.15)).endswith("keep_rows 1.150, all units open 1.200: saves no time")


@pytest.mark.parametrize("gater", ["mlp", "self"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_each_shape_is_timed_once_and_the_state_stays(gater, tokens, monkeypatch):
    seen = []
    made = swap.time_block
    monkeypatch.setattr(swap, "time_block", lambda *args: seen.append(args[2]) or made(*args))
    net = model()
    found = gatelet.convert(net, target_rate=0.25, bottleneck=4, gater=gater, batch=tokens)
    assert seen == [tokens]
    assert list(found.times) == list(found.converted) == ["0", "3", "6"]
    assert all(each.tokens == tokens and each.ms > 0 and each.dense_ms > 0 for each in found.times.values())
    assert f" ms for {tokens} token" in repr(found)
    for _, gating in blocks(net).values():
        assert gating.training
        assert int(gating.tokens) == 0
        assert gating.unit.threshold.isnan()
        assert not gating.fully_open


@pytest.mark.parametrize("gater", ["mlp", "self", "preview"])
def test_a_block_whose_rows_can_be_kept_is_timed_so_too(gater):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
    )
    net = transformers.LlamaForCausalLM(config)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = gatelet.convert(net, target_rate=0.4, bottleneck=4, gater=gater, batch=1)
    assert all(each.kept_ms > 0 and each.kept_open_ms > 0 for each in found.times.values())
    assert " with keep_rows " in repr(found)
    assert type(net.model.layers[0].mlp).__name__ == "ConditionalLlamaMLP"
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(gating.unit.threshold.isnan() for _, gating in blocks(net).values())


def test_rates_of_their_own_are_timed_each(monkeypatch):
    seen = []
    made = swap.time_block
    monkeypatch.setattr(swap, "time_block", lambda *args: seen.append(args[1].unit.target_rate) or made(*args))
    gatelet.convert(model(), target_rate={"0": 0.2, "3": 0.4, "6": 0.2}, bottleneck=4, batch=1)
    assert seen == [0.2, 0.4]


def test_other_weights_pass_between_two_runs(monkeypatch):
    """A layer alone would stay in the caches; in the model its weights have left them when the next token comes."""
    read = []
    made = report.in_turns
    monkeypatch.setattr(
        block_times, "in_turns", lambda runs, seconds, others, x: read.append(others) or made(runs, 0.0, others, x)
    )
    net = model()
    gatelet.convert(net, target_rate=0.25, gater="self", batch=1)
    assert read == [sum(parameter.nbytes for parameter in net.parameters())]
    assert report.others_of(nn.Linear(1 << 13, 1 << 12)) == report.CACHE


def test_without_a_batch_nothing_is_timed():
    assert gatelet.convert(model(), bottleneck=4).times == {}


def test_bad_batch():
    with pytest.raises(ValueError, match="batch must be an integer of at least 1"):
        gatelet.convert(model(), bottleneck=4, batch=0)
