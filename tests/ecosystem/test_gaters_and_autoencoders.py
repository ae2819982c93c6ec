"""What docs/works-with.md says of layers, for the other gaters (two stages, the layer's own) and SparseAutoencoder."""

import copy
import pickle

import pytest
import torch
from jaxtyping import config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gatelet.nn import ConditionalFFN, SparseAutoencoder
from gatelet.sparsity import calibrate_thresholds, penalty

X = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
GATERS = ["mlp", "two_stage", "self"]
CODES = ["top_k", "batch_top_k", "jump_relu", "relu", "gated"]


def layer(gater, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        made = ConditionalFFN(
            96, 768, None if gater == "self" else 8, estimator="straight_through_open", gater=gater, target_rate=0.1
        )
    if device == "cpu":
        calibrate_thresholds(made, [torch.randn(100, 96)])
    return made


def sae(activation, device="cpu", **options):
    torch.manual_seed(0)
    with torch.device(device):
        return SparseAutoencoder(96, 1024, activation, k=8, **options)


@pytest.fixture(params=[*GATERS, *CODES])
def make(request):
    return (lambda *a: layer(request.param, *a)) if request.param in GATERS else (lambda *a: sae(request.param, *a))


def loss_of(model, x=X):
    if isinstance(model, SparseAutoencoder):
        return model.loss(x).total
    return model(x).square().mean() + penalty(model)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def _sizes_may_be_tensors():
    """As torch.jit.trace has them; the run-time type checker refuses that."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.usefixtures("_sizes_may_be_tensors")
def test_traced_for_other_values(make):
    model = make().eval()
    other = torch.randn(64, 96)
    traced = torch.jit.trace(model, (X,), check_trace=False)
    close(traced(other), model(other))
    close(torch.export.export(model, (X,)).module()(other), model(other))


@torch.no_grad()
def test_shapes_alone(make):
    model = make().eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(X)).shape == X.shape
    assert model(X).isfinite().all()


def test_meta_device(make):
    source = make().eval()
    for assign in (False, True):
        made = make("meta")
        if not assign:
            made.to_empty(device="cpu")
        made.load_state_dict(source.state_dict(), assign=assign)
        with torch.no_grad():
            close(made.to("cpu").eval()(X), source(X))


def test_mixed_precision_and_averages(make):
    model = make().train()
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            loss = loss_of(model)
        loss.backward()
        averaged.update_parameters(model)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert averaged.eval()(X).isfinite().all()


def test_checkpointing_and_copies(make):
    model, found = make().train(), []
    state = copy.deepcopy(model.state_dict())
    for again in (False, True):
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(1)
        x = X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if again else model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.state_dict().keys() == state.keys()
        (y.square().mean() + (0 if isinstance(model, SparseAutoencoder) else penalty(model))).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([x.grad, *(g.clone() for g in grads), *(b.clone() for b in model.buffers())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_groups_of_latents_under_transforms():
    model = sae("top_k", groups=4, open_groups=2)
    x = X.clone().requires_grad_()
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    close(torch.func.grad(lambda x: model(x).square().sum())(X), want)
    with torch.no_grad():
        close(torch.func.vmap(model.eval())(X), model(X))


def test_what_hangs_on_the_second_stage_acts():
    model = layer("two_stage").eval()
    with torch.no_grad():
        model(X)
        assert model.active_fraction > 0
        model.gater.gates.register_forward_hook(lambda module, args, found: found - 100)
        model(X)
        assert model.active_fraction == 0
