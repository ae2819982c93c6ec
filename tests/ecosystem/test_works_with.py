"""The rest of docs/works-with.md: the rows without a file of their own; and the page names tests that exist."""

import copy
import io
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import gatelet
import ranks
from gatelet.nn import ConditionalFFN
from gatelet.sparsity import FiringRateBias, calibrate_thresholds, penalty

X = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
HERE = Path(__file__).parent


def layer(**options):
    torch.manual_seed(0)
    return ConditionalFFN(96, 768, 8, **options)


def ready(**options):
    made = layer(**options)
    calibrate_thresholds(made, [torch.randn(100, 96)])
    return made.eval()


def test_the_page_names_tests_that_exist():
    page = (HERE.parents[1] / "docs" / "works-with.md").read_text()
    named = re.findall(r"`(\w+)\.py::(\w+)`", page)
    assert len(named) >= 21
    folders = [HERE, HERE.parent / "nn"]
    for file, test in named:
        texts = [(folder / f"{file}.py").read_text() for folder in folders if (folder / f"{file}.py").exists()]
        assert any(f"def {test}(" in text for text in texts), (file, test)


COMPILED = """
import torch, gatelet
from gatelet.sparsity import calibrate_thresholds, penalty
torch.manual_seed(0)
layer = gatelet.nn.ConditionalFFN(96, 768, 8, estimator=gatelet.estimators.StraightThroughOpen())
run = torch.compile(layer, backend="aot_eager", dynamic={dynamic})
for batch in (64, 37, 64, 5):
    x, grads = torch.randn(batch, 96), []
    for each in (layer, run):
        torch.manual_seed(batch)
        layer.zero_grad()
        (each(x).square().mean() + penalty(layer)).backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
fresh = gatelet.nn.ConditionalFFN(96, 768, 8).eval()
with torch.no_grad():
    try:
        torch.compile(fresh, backend="aot_eager")(x)
    except RuntimeError as error:
        assert "no test-time threshold" in str(error), error
    else:
        raise AssertionError("uncalibrated, and computed something")
"""


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_batches_of_several_sizes(dynamic):
    found = subprocess.run([sys.executable, "-c", COMPILED.format(dynamic=dynamic)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-1500:]


TWICE = """
import torch, gatelet
from gatelet.sparsity import penalty
torch.manual_seed(0)
layer = gatelet.nn.ConditionalFFN(96, 768, 8, estimator=gatelet.estimators.StraightThroughOpen())

class Twice(torch.nn.Module):
    broken = False

    def __init__(self):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        x = self.layer(x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.layer(x)

net, grads, terms = Twice(), [], []
for each in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
    torch.manual_seed(1)
    layer.zero_grad()
    y = each(torch.randn(8, 96))
    terms.append(penalty(layer))
    (y.square().mean() + terms[-1]).backward()
    grads.append([p.grad.clone() for p in layer.parameters()])
torch.testing.assert_close(*terms)
for a, b in zip(*grads):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
net.broken, run = True, torch.compile(net, backend="aot_eager")
run(torch.randn(8, 96)).sum().backward()
run(torch.randn(8, 96))
try:
    penalty(layer)
except RuntimeError as error:
    assert "ran in two compiled graphs" in str(error), error
else:
    raise AssertionError("one of two penalties")
net.broken = False
run(torch.randn(8, 96)).sum().backward()
run(torch.randn(8, 96))
assert penalty(layer).requires_grad  # the pass before is over
"""


def test_compile_with_a_layer_used_twice():
    found = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-1500:]


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", ["straight_through", "score_function"])
def test_averaged_models(name, use_buffers):
    net = nn.Sequential(layer(estimator=name, sparsity=[FiringRateBias(0.5)]), nn.Linear(96, 8))
    net.append(gatelet.StochasticUnit("score_function"))
    averaged = torch.optim.swa_utils.AveragedModel(net, use_buffers=use_buffers)
    for _ in range(2):
        with gatelet.Tape() as tape:
            losses = net(X).sum(-1)
        tape.surrogate(losses).mean().backward()
        averaged.update_parameters(net)
    assert torch.equal(averaged.module[0].up.weight, net[0].up.weight)
    buffers = dict(net.named_buffers())
    assert all(value.shape == buffers[name].shape for name, value in averaged.module.named_buffers())
    state = net.state_dict()
    assert state["2.estimator.numerator"].shape == (8,)
    fresh = copy.deepcopy(net)
    fresh.load_state_dict(state)


def test_mixed_precision_and_gradient_scaling():
    net = layer()
    optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu")
    before = net.up.weight.detach().clone()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            loss = net(X).float().square().mean() + penalty(net)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert not torch.equal(net.up.weight, before)
    assert all(p.isfinite().all() for p in net.parameters())


def test_gradient_accumulation():
    net, found = layer(estimator="sigmoid", target_rate=None), []
    for parts in (1, 4):
        net.zero_grad()
        for x in X.chunk(parts):
            ((net(x).square().mean() + penalty(net)) / parts).backward()
        found.append(net.up.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_the_meta_device_and_assigned_weights():
    source = ready()
    for assign in (False, True):
        made = ConditionalFFN(96, 768, 8).to("meta")
        assert made.up.weight.is_meta
        if not assign:
            made.to_empty(device="cpu")
        made.load_state_dict(source.state_dict(), assign=assign)
        made.to("cpu").eval()
        assert torch.equal(made(X), source(X))
        assert 0 < gatelet.report(made).layers[0].open_share < 0.2


def test_pickling():
    made = ready()
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(made)), torch.load(file, weights_only=False), copy.deepcopy(made)):
        assert torch.equal(twin(X), made(X))
    training = layer()
    y = training(X)
    assert torch.equal(pickle.loads(pickle.dumps(training)).up.weight, training.up.weight)
    (y.sum() + penalty(training)).backward()


SPAWNED = """
import torch
import gatelet

def work(layer, x, queue):
    torch.set_num_threads(1)
    queue.put(layer(x).detach().sum().item())

if __name__ == "__main__":
    torch.manual_seed(0)
    layer, x = gatelet.nn.ConditionalFFN(96, 768, 8), torch.randn(64, 96)
    gatelet.sparsity.calibrate_thresholds(layer, [x])
    layer.eval().requires_grad_(False)
    want = layer(x).sum().item()
    for kind in ("spawn", "fork"):
        context = torch.multiprocessing.get_context(kind)
        queue = context.Queue()
        process = context.Process(target=work, args=(layer, x, queue))
        process.start()
        assert abs(queue.get(timeout=200) - want) < 1e-2 * (1 + abs(want)), kind
        process.join()

    class Features(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return layer(x[index])

    loader = torch.utils.data.DataLoader(Features(), batch_size=4, num_workers=1)
    torch.testing.assert_close(torch.cat(list(loader)), layer(x[:8]), rtol=1e-4, atol=1e-5)
"""


def test_spawned_and_forked_processes_and_data_loader_workers(tmp_path):
    (tmp_path / "spawned.py").write_text(SPAWNED)
    found = subprocess.run([sys.executable, str(tmp_path / "spawned.py")], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-1500:]


def test_threads():
    made = ready()
    with torch.no_grad():
        wants = [made(X[i : i + 4]) for i in range(0, 64, 4)]
        found, threads = {}, []
        for i, _ in enumerate(wants):

            def run(i=i):
                with torch.no_grad():
                    found[i] = [made(X[4 * i : 4 * i + 4]) for _ in range(5)]

            threads.append(threading.Thread(target=run))
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    for i, want in enumerate(wants):
        for have in found[i]:
            torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda h: h.sum(-1).long(), lambda h: h.sum(-1) > 1], ids=["counts", "truth"])
@pytest.mark.parametrize(
    "name", [name for name, kind in gatelet.estimators.ALL.items() if kind.needs == "loss" and name != "carms"]
)
def test_losses_that_are_counts(name, make):
    estimator = gatelet.estimators.ALL[name]()
    found = []
    for objective in (make, lambda h: make(h).float()):
        torch.manual_seed(0)
        a = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()
        loss = gatelet.surrogate(objective, a, copy.deepcopy(estimator), samples=4)
        assert loss.is_floating_point()
        loss.sum().backward()
        found.append(a.grad)
    assert found[0].any()
    assert torch.equal(*found)
    unit = gatelet.StochasticUnit(copy.deepcopy(estimator))
    a = torch.zeros(8, 3, requires_grad=True)
    with gatelet.Tape() as tape:
        losses = make(unit(tape.replicate(a, 4)))
    tape.surrogate(losses).mean().backward()
    assert a.grad.any()


def test_counts_are_refused_where_their_gradient_is_needed():
    a = torch.zeros(4, 3, requires_grad=True)
    for name in ("straight_through", "muprop", "rebar"):
        with pytest.raises(TypeError, match=r"its losses are torch\.int64, which pass no gradient"):
            gatelet.surrogate(lambda h: h.sum(-1).long(), a, name)


def test_categorical_estimators_in_a_layer():
    with pytest.raises(ValueError, match=r"estimator: a categorical ScoreFunction .* kind=.bernoulli."):
        layer(estimator=gatelet.estimators.ScoreFunction(kind="categorical"))


@pytest.mark.parametrize("bad", [True, float("nan"), float("inf"), -1.0, "1"])
def test_options_that_are_no_numbers(bad):
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="weight must be a finite number above 0"):
            gatelet.sparsity.KLRate(0.1, weight=bad)
        with pytest.raises(ValueError, match="target_rate must lie strictly between 0 and 1"):
            gatelet.sparsity.KLRate(bad)
    finally:
        config.update("jaxtyping_disable", False)


def sharded(rank, folder):
    """What each of the two processes runs."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    ranks.join(rank, folder)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    layer = gatelet.nn.ConditionalFFN(96, 768, 8, estimator="straight_through_open")
    x = torch.randn(64, 96)
    noise = torch.rand(64, 768)
    want = layer(x, noise=noise).detach()
    penalty(layer)
    fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with gatelet.sparsity.alone():
        have = layer(x, noise=noise)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    (have.square().mean() + penalty(layer)).backward()
    optimizer.step()
    calibrate_thresholds(layer, list(x.split(32)))
    layer.eval()
    with torch.no_grad():
        a = layer(x)
        assert torch.equal(a, layer(x))
    dcp.save({"model": get_model_state_dict(layer)}, checkpoint_id=f"{folder}/saved")
    torch.manual_seed(1)
    other = gatelet.nn.ConditionalFFN(96, 768, 8, estimator="straight_through_open").eval()
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/saved")
    other.load_state_dict(state["model"])
    with torch.no_grad():
        torch.testing.assert_close(other(x), a, rtol=1e-4, atol=1e-5)
    torch.save(a, f"{folder}/{rank}.pt")
    ranks.leave()


def test_sharded_parameters_and_distributed_checkpoints(tmp_path):
    first, second = ranks.saved(sharded, tmp_path)
    assert torch.equal(first, second)
