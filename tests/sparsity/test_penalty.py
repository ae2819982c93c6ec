"""penalty(model): the sum of the conditional layers' penalties, once per forward pass."""

import pytest
import torch
from torch import nn

from gatelet.estimators import StraightThrough
from gatelet.nn import ConditionalLinear
from gatelet.sparsity import Controller, KLRate, penalty


def layer(width_in=6, width=8, **options) -> ConditionalLinear:
    return ConditionalLinear(width_in, width, bottleneck=2, **options)


def test_it_is_the_controllers_penalty():
    net, x = layer(sparsity=[KLRate(0.1, weight=0.5)]), torch.randn(5, 6)
    net(x)
    logits = net.gater(x)
    expected = KLRate(0.1, weight=0.5).penalty(StraightThrough(), logits, logits)
    found = penalty(net)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert net.gater.gates.weight.grad.any()
    assert net.expert.weight.grad is None


def test_controllers_of_a_layer_add_up():
    class Constant(Controller):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def penalty(self, estimator, logits, gates):
            return None if self.value is None else logits.new_tensor(self.value)

    net = layer(sparsity=[Constant(1.0), Constant(None), Constant(0.25)])
    net(torch.randn(5, 6))
    assert penalty(net) == 1.25
    net = layer(sparsity=[])
    net(torch.randn(5, 6))
    assert penalty(net) == 0


def test_stacked_layers_add_up():
    net, x = nn.Sequential(layer(), nn.Sequential(layer(8, 5))), torch.randn(5, 6)
    net(x)
    parts = [net[0]._penalty, net[1][0]._penalty]
    assert penalty(net).item() == pytest.approx(sum(part.item() for part in parts))
    assert min(part.item() for part in parts) > 0


def test_no_conditional_layer():
    with pytest.raises(ValueError, match="model holds no conditional layer"):
        penalty(nn.Linear(2, 2))


def test_before_the_forward_pass_and_twice():
    net = layer()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"has not run in training since .* once"):
            penalty(net)
        net(torch.randn(5, 6))
        penalty(net)


def test_last_forward_pass_counts():
    net, x = layer(), torch.randn(5, 6)
    net(10 * x)
    net(x)
    last = penalty(net)
    net(x)
    torch.testing.assert_close(penalty(net), last)


def test_zero_in_eval():
    net = layer(target_rate=None, estimator="sigmoid").eval()
    net(torch.randn(5, 6))
    assert penalty(net).item() == 0
    assert penalty(net).shape == ()


def test_a_penalty_from_before_eval_is_not_taken():
    net = layer()
    net(torch.randn(5, 6))
    assert penalty(net.eval()).item() == 0
    with pytest.raises(RuntimeError, match="has not run in training"):
        penalty(net.train())


def test_frozen_layer_beside_a_training_one():
    net = nn.Sequential(layer(), layer(8, 5))
    net[0].unit.threshold.fill_(0.0)
    net[0].eval()
    net(torch.randn(5, 6))
    expected = net[1]._penalty.item()
    assert expected > 0
    assert penalty(net).item() == pytest.approx(expected)


def test_the_graph_is_forgotten():
    net = layer()
    net(torch.randn(5, 6))
    penalty(net).backward()
    assert net._penalty is None
    net(torch.randn(5, 6))
    penalty(net).backward()  # a second backward through a kept graph would fail


def test_layers_of_other_dtypes():
    net = nn.ModuleList([layer().double(), layer()])
    net[0](torch.randn(5, 6).double())
    net[1](torch.randn(5, 6))
    assert penalty(net).dtype == torch.float64


def test_training_with_the_penalty_reaches_the_rate():
    net = layer(20, 100, sparsity=[KLRate(0.1, weight=0.5)])
    x, sgd = torch.randn(256, 20), torch.optim.SGD(net.parameters(), 0.1)
    net.gater.gates.bias.data.zero_()
    net(x)
    before = net.active_fraction.item()
    penalty(net)
    for _ in range(200):
        net(x)
        sgd.zero_grad()
        penalty(net).backward()
        sgd.step()
    assert before > 0.4
    assert net.active_fraction.item() == pytest.approx(0.1, abs=0.01)
