"""Two processes of torch.distributed do what one does with the whole batch, uneven and empty parts included."""

import os
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import gatelet
import ranks
from gatelet.estimators import _distributed
from gatelet.nn import ConditionalFFN, ConditionalLinear
from gatelet.sparsity import AdaptiveL1, FiringRateBias, KLRate, calibrate_thresholds, penalty

CHAIN = (0.3, 0.1, 0.5, 0.2, 0.4, 0.3, 0.2, 0.3)  # whose thresholds stand still after five sweeps
PARTS = {"halves": [8, 8], "uneven": [11, 5], "empty": [16, 0]}


def data():
    return torch.randn(16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer(control):
    torch.manual_seed(0)
    if control == "two stages":
        return ConditionalLinear(12, 40, 4, estimator="straight_through", target_rate=0.3, gater="two_stage").double()
    made = {"kl": KLRate(0.3), "l1": AdaptiveL1(0.3, weight=0.1), "bias": FiringRateBias(0.6, step=0.1)}[control]
    return ConditionalLinear(12, 40, 4, estimator="straight_through", sparsity=[made]).double()


def rates(x, noise, control):
    """Penalty, its gradient as DDP averages it, and the state, after three steps."""
    net = layer(control)
    for _ in range(3):
        net.zero_grad()
        y = net(x, noise=noise)
        term = penalty(net)
        (term + 0 * y.sum()).backward()
    gradient = net.gater.gates.weight.grad.clone()
    return {"term": term.detach(), "gradient": gradient, **net.sparsity.state_dict()}


def baseline(x, start):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 6), gatelet.StochasticUnit("score_function")).double()
    for step in range(3):
        noise = torch.rand(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        with gatelet.Tape() as tape:
            h = net[1](net[0](x), noise=noise[start : start + len(x)])
        tape.surrogate(h.sum(-1) + 1).sum().backward()
    return net[1].state_dict()


def adaptive_step(x, start):
    """AIMLE's step size, which it learns from how many gates change in a backward pass."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 6), gatelet.StochasticUnit(gatelet.estimators.AIMLE(rate=0.1))).double()
    for step in range(3):
        noise = torch.rand(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        (net[1](net[0](x), noise=noise[start : start + len(x)]) * torch.arange(6.0)).sum().backward()
    return net[1].state_dict()


def shrunk(x, start):
    """The gradient with a baseline that leans on the other examples, summed over the batch."""
    torch.manual_seed(0)
    weight = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    noise = torch.rand(2, 16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    method = gatelet.estimators.ALL["shrunk_baseline"]()
    losses = method.surrogate(lambda h: h.sum(-1) ** 2, x @ weight, noise[:, start : start + len(x)])
    losses.sum().backward()
    return {"sum": weight.grad}


def calibrated(x):
    torch.manual_seed(0)
    net = ConditionalFFN(12, 200, 4, target_rate=0.3).double()
    shares = calibrate_thresholds(net, list(x.split(4)))
    return {"threshold": net.unit.threshold, "share": torch.tensor(shares["unit"])}


class Added(nn.Module):
    """A layer whose output is added to its input, as in a transformer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + self.layer(x)


def chain(x):
    """Thresholds of several layers, each of which sees what the others before it let through."""
    torch.manual_seed(0)
    net = nn.Sequential(*[Added(ConditionalFFN(12, 200, 4, target_rate=rate)) for rate in CHAIN]).double()
    shares = calibrate_thresholds(net, list(x.split(4)))
    thresholds = {f"{i}": added.layer.unit.threshold for i, added in enumerate(net)}
    return thresholds | {f"share {i}": torch.tensor(share) for i, share in enumerate(shares.values())}


def everything(rank, sizes):
    x, noise = data(), torch.rand(16, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, noise = (each.split(sizes)[rank] for each in (x, noise))
    found = {control: rates(x, noise, control) for control in ("kl", "l1", "bias", "two stages")}
    first = sum(sizes[:rank])
    found |= {"baseline": baseline(x, first), "step size": adaptive_step(x, first), "shrunk": shrunk(x, first)}
    return {**found, "calibration": calibrated(x), "chain": chain(x)}


def checkpointed(rank):
    """KLRate's exchange is not repeated in the backward pass: the processes repeat at other times."""
    from torch.utils.checkpoint import checkpoint

    net, x = layer("kl"), data().split([8, 8])[rank].requires_grad_()
    y = checkpoint(net, x, use_reentrant=False)
    (y.sum() + penalty(net)).backward()
    return net.gater.gates.weight.grad


def ddp(rank):
    """One step under DistributedDataParallel, with an uneven batch."""
    net = layer("kl")
    run = nn.parallel.DistributedDataParallel(net)
    x = data().split([8, 8])[rank]
    noise = torch.rand(16, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64).split([8, 8])[rank]
    (run(x, noise=noise).square().sum(-1).mean() + penalty(run)).backward()
    return [p.grad for p in net.parameters()]


def alone(rank):
    """What one process does by itself, and what it hears when it should not have."""
    net, found = ConditionalFFN(12, 64, 4), {}
    if rank == 0:
        x = data().float()
        began = time.monotonic()
        try:
            calibrate_thresholds(net, [x], timeout=1.0)
        except RuntimeError as error:
            found["said"], found["seconds"] = str(error), time.monotonic() - began
        found["share"] = calibrate_thresholds(net, [x], local=True)["unit"]
        with gatelet.sparsity.alone():
            net(x).sum().backward()
        with torch.no_grad():
            net(x)  # a look waits for nobody
        penalty(net)
    torch.distributed.barrier()
    bad = [torch.full((4, 12), float("nan"))] if rank else [data().float()]
    try:
        calibrate_thresholds(net, bad)
    except (RuntimeError, ValueError) as error:
        found["bad"] = str(error)
    return found


def reported(rank):
    """What the processes count together and alone, of 11 and 5 examples, and what one hears that came alone."""
    torch.manual_seed(0)
    net, found = ConditionalFFN(12, 64, 4).double(), {}
    calibrate_thresholds(net, [data()], local=True)
    net.eval()(data().split([11, 5])[rank])
    found["fraction"] = float(net.active_fraction)
    found["together"] = gatelet.report(net).layers[0]
    found["local"] = gatelet.report(net, local=True).layers[0]
    with gatelet.sparsity.alone():
        found["alone"] = gatelet.report(net).layers[0]
    if rank == 0:
        try:
            gatelet.report(net, timeout=1.0)
        except RuntimeError as error:
            found["said"] = str(error)
    torch.distributed.barrier()
    return {key: value if isinstance(value, str | float) else asdict(value) for key, value in found.items()}


def late(rank):
    """What the first process says while it waits for the second in a training step, which comes late."""
    net, x = layer("kl"), data().split([8, 8])[rank]
    os.environ["GATELET_PATIENCE"] = "6"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if rank:
            time.sleep(3)
        net(x)
        penalty(net).backward()
    return {"said": [str(each.message) for each in said], "gradient": net.gater.gates.weight.grad}


def busy(rank):
    """One process evaluates for longer than the other's patience with a training step."""
    net, x = layer("kl"), data().split([8, 8])[rank]
    calibrate_thresholds(net, [x], local=True)
    os.environ["GATELET_PATIENCE"], _distributed._next_sign = "2", 0.0
    if rank:
        net.eval()
        for _ in range(10):
            time.sleep(0.4)
            net(x)
        net.train()
    net(x)
    penalty(net).backward()
    return net.gater.gates.weight.grad


def lone(rank, folder):
    """What one process hears that takes a training step which the other does not take; ever after."""
    net, found = layer("kl"), {}
    os.environ["GATELET_PATIENCE"] = "1.5"
    if rank == 0:
        began = time.monotonic()
        for attempt in range(2):
            try:
                net(data())
            except RuntimeError as error:
                found[f"said {attempt}"] = str(error)
        found["seconds"] = time.monotonic() - began
        with gatelet.sparsity.alone():
            net(data())
        Path(folder, "lone").touch()
    deadline = time.monotonic() + 60
    while not Path(folder, "lone").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    # What it sent by itself met no message of the program's own, of the same size.
    ours = torch.full((41,), float(rank), dtype=torch.float64)
    torch.distributed.all_reduce(ours)
    return found | {"ours": ours}


def first_alone(rank):
    """The same where no step has been taken together before."""
    os.environ["GATELET_PATIENCE"] = "1"
    try:
        if rank == 0:
            layer("kl")(data())
    except RuntimeError as error:
        return str(error)
    finally:
        torch.distributed.barrier()
        os.environ["GATELET_PATIENCE"] = "120"  # a busy machine is no reason to fail


def main(rank, folder):
    """What each of the two processes runs."""
    ranks.join(rank, folder)
    found = {"first": first_alone(rank)}
    found |= {name: everything(rank, sizes) for name, sizes in PARTS.items()}
    found |= {"checkpointed": checkpointed(rank), "ddp": ddp(rank), "alone": alone(rank)}
    found |= {"reported": reported(rank), "late": late(rank), "busy": busy(rank)}
    found |= {"lone": lone(rank, folder)}  # the last one: a process that gave up takes no further step
    torch.save(found, f"{folder}/{rank}.pt")
    ranks.leave()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return ranks.saved(main, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("parts", PARTS)
def test_together_as_one(ran, parts):
    whole, (first, second) = everything(0, [16]), [each[parts] for each in ran]
    for name, values in whole.items():
        for key, value in values.items():
            have = [first[name][key], second[name][key]]
            if key == "gradient":  # DDP's mean
                have = [(have[0] + have[1]) / 2] * 2
            if key == "sum":
                have = [have[0] + have[1]]
            for each in have:
                torch.testing.assert_close(
                    each, value, rtol=1e-6, atol=1e-9, msg=lambda s, at=(name, key): f"{at}: {s}"
                )


def test_under_ddp_and_checkpointing(ran):
    net = layer("kl")
    noise = torch.rand(16, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (net(data(), noise=noise).square().sum(-1).mean() + penalty(net)).backward()
    for a, b, whole in zip(ran[0]["ddp"], ran[1]["ddp"], net.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, whole.grad, rtol=1e-6, atol=1e-9)
    assert all(each["checkpointed"].isfinite().all() for each in ran)


def test_one_process_alone(ran):
    found = ran[0]["alone"]
    assert "1 of 2 processes of torch.distributed called it within 1 s" in found["said"]
    assert "local=True" in found["said"]
    assert found["seconds"] < 20
    assert abs(found["share"] - 0.1) < 0.01
    assert "process 1 failed: NotFiniteError: x holds 48 values that are NaN" in found["bad"]
    assert "NaN" in ran[1]["alone"]["bad"]


def test_a_report_is_of_all_processes(ran):
    torch.manual_seed(0)
    net = ConditionalFFN(12, 64, 4).double()
    calibrate_thresholds(net, [data()])
    net.eval()(data())
    whole, (first, second) = asdict(gatelet.report(net).layers[0]), [each["reported"] for each in ran]
    assert first["together"] == second["together"] == whole
    assert (first["local"]["tokens"], second["local"]["tokens"]) == (11, 5)
    own = (11 * first["fraction"] + 5 * second["fraction"]) / 16  # active_fraction is each process's own
    assert own == pytest.approx(whole["open_share"], abs=1e-6)
    assert first["local"] == first["alone"]
    assert "report: 1 of 2 processes" in first["said"]
    assert "local=True" in first["said"]


def test_a_lone_training_step_fails_in_words(ran):
    assert "a layer in training: 1 of 2 processes" in ran[0]["first"]
    assert "alone()" in ran[0]["first"]
    found = ran[0]["lone"]
    assert "process 1 did not come to this one within 1.5 s" in found["said 0"]
    assert "alone()" in found["said 0"]
    assert "GATELET_PATIENCE" in found["said 0"]
    assert "has given up waiting for the others in an earlier step" in found["said 1"]
    assert found["seconds"] < 20
    for each in ran:
        assert each["lone"]["ours"].tolist() == [1.0] * 41


def test_who_evaluates_is_waited_for(ran):
    first, second = [each["busy"] for each in ran]
    assert first.isfinite().all()
    assert first.any()
    assert second.any()


@pytest.mark.parametrize("said", ["soon", "0", "-3", "nan"])
def test_patience_is_a_number_of_seconds(said, monkeypatch):
    monkeypatch.setenv("GATELET_PATIENCE", said)
    with pytest.raises(ValueError, match=f"GATELET_PATIENCE: must be a number of seconds above 0, not '{said}'"):
        _distributed.patience()


def test_who_waits_in_a_training_step_says_so(ran):
    first, second = [each["late"] for each in ran]
    assert any("not all of them came to this one" in said and "alone()" in said for said in first["said"])
    assert not second["said"]
    assert all(each["gradient"].isfinite().all() and each["gradient"].any() for each in (first, second))
