"""Units with classes, and estimators that compare replicas, inside a network with a tape."""

import pytest
import torch
from torch import nn

import gatelet
from gatelet.estimators import ALL

CATEGORICAL = [name for name, method in ALL.items() if "categorical" in method.kinds and method.needs != "objective"]
REPLICATED = [name for name, method in ALL.items() if method.needs == "loss" and "bernoulli" in method.kinds]


def squares(h):
    return (h - torch.linspace(-1, 2, h.shape[-1], dtype=h.dtype)).square().sum(-1)


@pytest.mark.parametrize("name", CATEGORICAL)
def test_a_categorical_unit_samples_one_class_and_learns(name):
    method = ALL[name](kind="categorical")
    unit, logits = (
        gatelet.StochasticUnit(method),
        torch.randn(6, 5, 4, requires_grad=True),
    )  # six examples, five variables
    with gatelet.Tape() as tape:
        gates = unit(tape.replicate(logits, method.replicas))
        loss = (gates * torch.arange(4.0)).sum((-1, -2)).square()
    torch.testing.assert_close(gates.sum(-1), torch.ones(6 * method.replicas, 5))
    if method.binary:
        assert ((gates == 0) | (gates == 1)).all()
    tape.surrogate(loss).mean().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any()
    # Softmax does not see a shift of all of a variable's logits.
    if name != "straight_through":
        torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(6, 5), rtol=0, atol=1e-4)
    assert torch.equal(unit.eval()(logits).argmax(-1), logits.argmax(-1))
    assert torch.equal(unit(logits).sum(-1), torch.ones(6, 5))


def test_a_categorical_score_function_has_the_hand_formula():
    unit = gatelet.StochasticUnit(gatelet.estimators.ScoreFunction("none", kind="categorical"))
    logits = torch.randn(3, 4, requires_grad=True)
    with gatelet.Tape() as tape:
        gates = unit(logits)
    loss = torch.tensor([1.0, -2.0, 3.0])
    tape.surrogate(loss).sum().backward()
    torch.testing.assert_close(logits.grad, (gates - logits.detach().softmax(-1)) * loss[:, None])


@pytest.mark.parametrize("name", REPLICATED)
def test_replicas_on_a_tape_equal_the_surrogate_at_the_same_noise(name):
    """The two ways in give one gradient: 4 replicas through a module, and through gatelet.surrogate."""
    method = ALL[name]()
    logits = torch.randn(3, 5, dtype=torch.float64)
    noise = method.draw_noise(logits.expand(4, 3, 5), torch.Generator().manual_seed(0))
    method.surrogate(squares, logits, noise)  # a state gets its size
    state = {key: value.clone() for key, value in method.state_dict().items()}
    leaf = logits.clone().requires_grad_()
    gatelet.surrogate(squares, leaf, method, samples=4, noise=noise).sum().backward()
    method.load_state_dict(state)
    other = logits.clone().requires_grad_()
    with gatelet.Tape() as tape:
        loss = squares(gatelet.StochasticUnit(method)(tape.replicate(other, 4), noise=noise))
    (tape.surrogate(loss).sum() / 4).backward()
    torch.testing.assert_close(other.grad, leaf.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["arm", "disarm"])
def test_antithetic_pairs_refuse_a_second_stochastic_layer(name):
    def unit():
        return gatelet.StochasticUnit(name)

    net = nn.Sequential(nn.Linear(5, 4), unit(), nn.Linear(4, 4), unit())
    with gatelet.Tape() as tape:
        loss = net(tape.replicate(torch.randn(8, 5), 2)).sum(-1)
    with pytest.raises(ValueError, match=r"single stochastic layer.*take one of score_function, leave_one_out"):
        tape.surrogate(loss)


def test_antithetic_pairs_say_how_to_replicate():
    with gatelet.Tape(), pytest.raises(ValueError, match=r"even number of samples.*tape\.replicate\(x, samples\)"):
        gatelet.StochasticUnit("disarm")(torch.zeros(3, 4, requires_grad=True))


def test_replicating_in_two_ways_is_refused():
    with gatelet.Tape() as tape:
        tape.replicate(torch.zeros(3, 2), 2)
        with pytest.raises(ValueError, match="has 2 replicas, not 3"):
            tape.replicate(torch.zeros(3, 2), 3)
