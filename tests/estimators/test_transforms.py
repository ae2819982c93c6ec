"""Every estimator under torch.compile, torch.func and autocast.

A straight-through gate written as an autograd.Function silently returns zeros under torch.compile with torch.func.grad;
ours are algebra, and these tests hold them to the eager result.
"""

import copy
import json
import subprocess
import sys

import pytest
import torch
from test_contract import CASES, draw, gradient, logits_for, replicas_for, squares, states

import gatelet
from gatelet.estimators import ALL

# Runs outside of pytest's process: there, the shape checks that only tests switch on wrap every function.
COMPILED = """
import copy, json, torch, gatelet
torch.set_num_threads(1)
found = {}
for name, cls in gatelet.estimators.ALL.items():
    if "bernoulli" not in cls.kinds:
        continue
    torch.manual_seed(0)
    method = cls()
    samples = max(2, method.replicas)
    logits, weight = torch.randn(3, 4), torch.randn(4)
    noise = method.draw_noise(logits.expand(samples, 3, 4))
    method.surrogate(lambda h: h.sum(-1), logits, noise)  # a state gets its size at the first call

    def function(a, method):
        loss = lambda h: ((h * weight).sum(-1) - 0.3).square()
        return gatelet.surrogate(loss, a, method, samples=samples, noise=noise)

    def run(call):
        leaf = logits.clone().requires_grad_()
        value = call(leaf, copy.deepcopy(method))
        value.sum().backward()
        return value.detach(), leaf.grad

    def func_grad(call):
        return (torch.func.grad(lambda a: call(a, copy.deepcopy(method)).sum())(logits),)

    torch._dynamo.reset()
    results = {"surrogate": (run(function), run(torch.compile(function, fullgraph=True, backend="aot_eager")))}
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a: func_grad(function)[0], backend="aot_eager"
    )
    results["func.grad"] = (func_grad(function), (compiled(logits),))
    if method.needs != "objective":
        net = torch.nn.Sequential(torch.nn.Linear(5, 4), gatelet.StochasticUnit(method), torch.nn.Linear(4, 1))
        x, outputs = torch.randn(6, 5), []
        for wrap in (lambda net: net, lambda net: torch.compile(net, fullgraph=True, backend="aot_eager")):
            torch._dynamo.reset()
            torch.manual_seed(1)
            mine = copy.deepcopy(net)
            with gatelet.Tape() as tape:
                loss = wrap(mine)(tape.replicate(x, samples)).square().sum(-1)
            tape.surrogate(loss).mean().backward()
            outputs.append((loss.detach(), mine[0].weight.grad))
        results["module"] = tuple(outputs)
    found[name] = {
        what: all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*both, strict=True)) for what, both in results.items()
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [name for name, cls in ALL.items() if "bernoulli" in cls.kinds])
def test_compiled_in_one_graph_equals_eager(name, compiled):
    assert all(compiled[name].values()), compiled[name]


@pytest.mark.parametrize(("name", "make"), CASES)
def test_func_grad_equals_autograd(name, make):
    logits = logits_for(3, 4)
    *_, method = states(make, 3, 4)
    noise = draw(method, logits, samples=2)
    expected = gradient(copy.deepcopy(method), squares, logits, noise)
    found = torch.func.grad(lambda a: copy.deepcopy(method).surrogate(squares, a, noise).sum())(logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_vmap_equals_a_loop(name, make):
    logits = logits_for(5, 4)
    *_, method = states(make, 5, 4)
    samples = replicas_for(method, 2)
    noise = torch.stack([draw(method, row, samples=2, seed=index) for index, row in enumerate(logits)])

    def one(a, z):
        return gatelet.surrogate(squares, a, copy.deepcopy(method), samples=samples, noise=z)

    found = torch.func.vmap(torch.func.grad(one))(logits, noise)
    expected = torch.stack([torch.func.grad(one)(a, z) for a, z in zip(logits, noise, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_autocast_gives_the_float32_estimate_within_its_rounding(name, make):
    method, logits = make(), logits_for(3, 4, torch.float32)
    weight = torch.linspace(-1, 1, 4)[:, None]
    noise = draw(method, logits, samples=2)

    def objective(h):
        return (h @ weight).squeeze(-1).square()

    expected = gradient(copy.deepcopy(method), objective, logits, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradient(copy.deepcopy(method), lambda h: objective(h).float(), logits, noise)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
