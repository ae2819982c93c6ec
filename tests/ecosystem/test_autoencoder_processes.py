"""A sparse autoencoder under DistributedDataParallel: two processes with half of the batch each train as one does."""

import os

import pytest
import torch
from torch import nn

import gatelet
import ranks
from gatelet.nn import SparseAutoencoder

CASES = {
    "top_k": {},
    "groups": {"groups": 4, "open_groups": 2},
    "batch_top_k": {"activation": "batch_top_k"},
    "batch_top_k, listed": {"activation": "batch_top_k", "k": 1},
    "jump_relu": {"activation": "jump_relu"},
    "jump_relu, listed": {"activation": "jump_relu", "k": 1},
    "relu": {"activation": "relu", "unit_decoder": False},
    "gated": {"activation": "gated"},
}
ROWS = {
    "top_k by row": {"sparse_grad": True},
    "batch_top_k by row": {"sparse_grad": True, "activation": "batch_top_k", "k": 1},
}
LOSSES = ("total", "reconstruction", "sparsity", "auxiliary", "balance")
STEPS = 4


def data(step):
    return torch.randn(48, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def sae(options):
    torch.manual_seed(0)
    made = SparseAutoencoder(12, 40, dead_after=60, **{"k": 3} | options).double()
    made.start_from(data(0))
    with torch.no_grad():
        made.encoder_bias[::7] = -1.5  # seldom open: dead after two steps
    return made


class Loss(nn.Module):
    """What DistributedDataParallel wraps: it calls forward, and the loss is another method."""

    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x):
        return self.sae.loss(x)


def trained(model, run, part, before_step=lambda: None):
    """Losses, state and weights over some steps."""
    optimizer, found = gatelet.RowAdam(model.parameter_groups(0.01)), {}
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = run(data(step)[part])
        parts.total.backward()
        before_step()
        optimizer.step()
        found |= {f"{name} {step}": getattr(parts, name).detach() for name in LOSSES}
        found |= {f"{name} {step}": each.clone() for name, each in model.named_buffers()}
    found["dead"] = torch.tensor(model.dead)
    with torch.no_grad():
        found["eval"] = model.eval()(data(0))
    return found | {name: each.clone() for name, each in model.state_dict().items()}


def under_ddp(options, part):
    model = sae(options)
    return trained(model, nn.parallel.DistributedDataParallel(Loss(model)), part)


def by_rows(options, part):
    """Gradients by row, added up over the processes as torch adds sparse tensors."""
    model = sae(options)

    def average():
        for each in model.parameters():
            grad = each.grad.coalesce() if each.grad.is_sparse else each.grad
            torch.distributed.all_reduce(grad)
            each.grad = grad / 2

    return trained(model, Loss(model), part, average)


def refused(part):
    """What is said to gradients by row under the wrapper, and to a step that one process takes alone."""
    found = {}
    with pytest.raises(RuntimeError) as told:
        nn.parallel.DistributedDataParallel(Loss(sae({"sparse_grad": True})))(data(0)[part])
    found["rows"] = str(told.value)
    if part.start:
        os.environ["GATELET_PATIENCE"] = "1"
        sae({}).eval().encode(data(0))  # a look waits for nobody
        with pytest.raises(RuntimeError) as told:
            sae({"activation": "batch_top_k"}).loss(data(0))
        found["alone"] = str(told.value)
    return found


def main(rank, folder):
    """What each of the two processes runs."""
    ranks.join(rank, folder)
    part = slice(24 * rank, 24 * rank + 24)
    found = {name: under_ddp(options, part) for name, options in CASES.items()}
    found |= {name: by_rows(options, part) for name, options in ROWS.items()}
    found["refused"] = refused(part)
    torch.save(found, f"{folder}/{rank}.pt")
    ranks.leave()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return ranks.saved(main, tmp_path_factory.mktemp("autoencoders"), GATELET_PATIENCE="120")


@pytest.mark.parametrize("name", [*CASES, *ROWS])
def test_two_processes_train_as_one(ran, name):
    model = sae((CASES | ROWS)[name])
    whole, (first, second) = trained(model, Loss(model), slice(0, 48)), [each[name] for each in ran]
    assert whole["dead"] or name in ("relu", "gated")
    for key, value in whole.items():
        have = [first[key], second[key]]
        if key.split()[0] in LOSSES:  # each process's own, of its half
            have = [(have[0] + have[1]) / 2]
        for each in have:
            torch.testing.assert_close(each, value, rtol=1e-6, atol=1e-9, msg=lambda s, at=key: f"{at}: {s}")


def test_what_cannot_be_is_told(ran):
    assert "sparse_grad: DistributedDataParallel takes gradients by row" in ran[0]["refused"]["rows"]
    assert "process 0 did not come to this one within 1 s" in ran[1]["refused"]["alone"]
