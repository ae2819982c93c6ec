"""convert(batch=...): what to expect of each block; nothing of the model's state is touched."""

import pytest
from torch import nn

import gatelet
from gatelet.convert import blocks, swap
from gatelet.convert.promise import Promise


def model():
    return nn.Sequential(*[part for _ in range(3) for part in (nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))])


def test_words():
    assert str(Promise(1, 2.0, 1.0)) == "1.000 ms for 1 token, dense 2.000"
    assert str(Promise(32, 2.0, 1.95)) == "1.950 ms for 32 tokens, dense 2.000: promises nothing"


@pytest.mark.parametrize("gater", ["mlp", "self"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_each_shape_is_timed_once_and_the_state_stays(gater, tokens, monkeypatch):
    seen = []
    made = swap.promise
    monkeypatch.setattr(swap, "promise", lambda *args: seen.append(args[2]) or made(*args))
    net = model()
    found = gatelet.convert(net, target_rate=0.25, bottleneck=4, gater=gater, batch=tokens)
    assert seen == [tokens]
    assert list(found.promises) == list(found.converted) == ["0", "3", "6"]
    assert all(each.tokens == tokens and each.ms > 0 and each.dense_ms > 0 for each in found.promises.values())
    assert f" ms for {tokens} token" in repr(found)
    for _, gating in blocks(net).values():
        assert gating.training
        assert int(gating.tokens) == 0
        assert gating.unit.threshold.isnan()
        assert not gating.fully_open


def test_without_a_batch_nothing_is_timed():
    assert gatelet.convert(model(), bottleneck=4).promises == {}


def test_bad_batch():
    with pytest.raises(ValueError, match="batch must be an integer of at least 1"):
        gatelet.convert(model(), bottleneck=4, batch=0)
