"""torch.utils.checkpoint: what it repeats is the same pass, and moves nothing a second time."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gatelet
from gatelet.nn import ConditionalFFN, ConditionalLinear
from gatelet.sparsity import AdaptiveL1, BetaNoise, Controller, FiringRateBias, KLRate, penalty

X = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))


class Counting(Controller):
    """A user's controller, with a buffer that it changes in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def shift(self, logits, *, generator=None):
        return logits + 0.3 * self.count

    def penalty(self, estimator, logits, gates):
        self.count += 1
        return self.count.clone() * logits.square().mean()


CONTROLLERS = {
    "kl": lambda: [KLRate(0.2)],
    "l1": lambda: [AdaptiveL1(0.2, weight=0.1)],
    "bias": lambda: [KLRate(0.2), FiringRateBias(0.3, step=0.5)],
    "noise": lambda: [BetaNoise(0.2)],
    "mine": lambda: [Counting()],
}
LAYERS = {
    "linear": lambda **options: ConditionalLinear(24, 48, 4, **options),
    "ffn": lambda **options: ConditionalFFN(24, 64, 4, dropout=0.2, **options),
}


def step(layer, x, run, generator=None):
    """Gradients of two passes that are under way at once, and the layer's state after them."""
    torch.manual_seed(3)
    named = {} if generator is None else {"generator": generator}
    outs, terms = [], []
    for part in x.chunk(2):
        outs.append(run(layer, part, **named))
        terms.append(penalty(layer))
    for out, term in zip(outs, terms, strict=True):  # in the order of a pipeline
        (out.square().sum() + term).backward()
    grads = [p.grad for p in layer.parameters()]
    return grads, dict(layer.sparsity.named_buffers()), layer.opened, int(layer.tokens)


def repeated(layer, x, **named):
    return checkpoint(layer, x, use_reentrant=False, **named)


@pytest.mark.parametrize("control", CONTROLLERS)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("own", [False, True], ids=["torch's generator", "its own"])
def test_the_same_step_with_and_without(make, control, own):
    layer = make(sparsity=CONTROLLERS[control]())
    layer(X)  # so that there is a state to see
    found = []
    for run in (lambda f, x, **named: f(x, **named), repeated):
        generator = torch.Generator().manual_seed(5) if own else None
        found.append(step(copy.deepcopy(layer), X.clone().requires_grad_(), run, generator))
    (grads, buffers, opened, tokens), (again, buffers2, opened2, tokens2) = found
    for a, b in zip(grads, again, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(buffers[key], buffers2[key]) for key in buffers)
    assert torch.equal(opened, opened2)
    assert tokens == tokens2


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", ["score_function", "leave_one_out", "disarm"])
def test_units_that_learn_from_the_loss(name, samples):
    samples = max(samples, 2 if name != "score_function" else 1)
    net = nn.Sequential(nn.Linear(24, 8), gatelet.StochasticUnit(name), nn.Linear(8, 3))
    found = []
    for again in (False, True):
        twin = copy.deepcopy(net)
        torch.manual_seed(2)
        with gatelet.Tape() as tape:
            x = tape.replicate(X, samples)
            y = checkpoint(twin, x, use_reentrant=False) if again else twin(x)
        tape.surrogate(y.square().sum(-1)).mean().backward()
        found.append([p.grad for p in twin.parameters()])
    assert found[0][0].any()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_old_kind_says_what_to_do():
    layer, x = ConditionalFFN(24, 64, 4), X.clone().requires_grad_()
    checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        penalty(layer)
    with torch.no_grad():  # a number alone can be had
        layer(x)
        assert not penalty(layer).requires_grad
    unit = gatelet.StochasticUnit("score_function")
    with gatelet.Tape() as tape:
        y = checkpoint(unit, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"no tape recorded its forward pass.*use_reentrant=False"):
        tape.surrogate(y.sum(-1)).mean().backward()


def test_the_old_kind_without_a_penalty_moves_state_once():
    layer = ConditionalFFN(24, 64, 4, sparsity=[FiringRateBias(0.9, step=1.0)])
    checkpoint(layer, X.clone().requires_grad_(), use_reentrant=True).sum().backward()
    assert float(layer.sparsity[0].bias.max()) == 1.0
    assert int(layer.tokens) == len(X)


def test_other_noise_is_refused():
    layer = ConditionalFFN(24, 64, 4)
    y = checkpoint(layer, X.clone().requires_grad_(), use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match="preserve_rng_state=True"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_in_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=64))
    gatelet.convert(model, 0.25, bottleneck=2, sparsity=[FiringRateBias(0.9, step=1.0)])
    ids, found = torch.randint(11, (2, 6)), []
    for on in (False, True):
        twin = copy.deepcopy(model).train()
        if on:
            twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        (twin(ids, labels=ids, use_cache=False).loss + penalty(twin)).backward()
        found.append([p.grad for p in twin.parameters()] + [each for each in twin.buffers() if each.numel() > 1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
