"""Compiled, exported, saved, in mixed precision, inside of other people's training loops."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import config
from torch import nn

import gatelet
from gatelet.nn import ConditionalFFN
from gatelet.sparsity import calibrate_thresholds, penalty

X = torch.randn(160, 192, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _as_user():
    """What is called here is called as by a user, without shape checks."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def mlp(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 768), nn.GELU(), nn.Linear(768, 192), nn.Linear(192, 4))
    gatelet.convert(model, target_rate=0.1, bottleneck=8, **options)
    return model


def layer(**options):
    torch.manual_seed(0)
    return ConditionalFFN(192, 768, 8, **options)


MAKE = {"layer": layer, "gated": lambda: layer(gated=True, activation="silu"), "tanh": lambda: layer(activation="tanh")}
MAKE["converted"] = mlp
every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def ready(make):
    model = make()
    calibrate_thresholds(model, [torch.randn(100, 192)])  # not X, one of whose logits would be the threshold
    return model.eval().requires_grad_(False)


TRACED = """
import io, sys, warnings
import torch
import test_deploy as here
from gatelet.kernels import explain
from gatelet.kernels.backends.numba import products

model = here.ready(here.MAKE[sys.argv[1]])
here.compare_training(sys.argv[1])
calls = []
plain = products.dots
products.dots = lambda *args, **named: calls.append(1) or plain(*args, **named)
x, many = here.X, torch.randn(300, 192)
assert explain(x, torch.empty(768, 192), torch.zeros(160, 768)).backend == "numba"

def same(have, x):
    calls.clear()
    torch.testing.assert_close(have(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(calls) >= 2, "the kernels run in both"

same(torch.compile(model, backend=sys.argv[2], fullgraph=True), x)
before = [int(part.tokens) for part in model.modules() if hasattr(part, "tokens")]
program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=4096)},))
assert before == [int(part.tokens) for part in model.modules() if hasattr(part, "tokens")], "an export counts nothing"
file = io.BytesIO()
torch.export.save(program, file)
file.seek(0)
again = torch.export.load(file).module()
same(again, x)
same(again, many)
"""


@pytest.mark.parametrize(("name", "backend"), [("gated", "aot_eager"), ("converted", "inductor")])
def test_compiled_and_exported(name, backend):
    """In a process of its own: pytest's shape checks and poisoned memory cannot be traced."""
    command = [sys.executable, "-c", TRACED, name, backend]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr[-1500:]


def compare_training(name):
    """Compare the gradients of a compiled and of a plain training step."""
    model = MAKE[name]()
    units = [module for module in model.modules() if isinstance(module, gatelet.StochasticUnit)]
    for unit in units:  # gates without noise, so that both runs draw the same
        unit.estimator = gatelet.estimators.StraightThrough(unit="hard")
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        (run(X).square().mean() + penalty(model)).backward()
        found.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every
def test_mixed_precision(make, device):
    model = make()
    with torch.autocast(device, torch.bfloat16):
        loss = model(X).float().square().mean() + penalty(model)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    model = ready(make)
    with torch.autocast(device, torch.bfloat16):
        have = model(X)
    assert have.dtype == torch.bfloat16
    # logits have 8 bits: some gates near the threshold fall on its other side
    assert (have.float() - model(X)).square().mean() < 0.1 * model(X).square().mean()


@every
def test_safetensors_round_trip(make, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = ready(make), make().eval()
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other(X), model(X))


@every
def test_torch_save_round_trip(make):
    model, other = ready(make), make().eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(X), model(X))


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, intermediate_size=64))
    gatelet.convert(model, target_rate=0.25, bottleneck=2)
    return model


DATA = [{"input_ids": torch.randint(11, (6,)), "labels": torch.tensor(i % 2)} for i in range(16)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.cpu
def test_in_hugging_faces_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            loss, out = super().compute_loss(model, inputs, return_outputs=True, **options)
            loss = loss + gatelet.sparsity.penalty(model)
            return (loss, out) if return_outputs else loss

    model = bert()
    before = copy.deepcopy(model.state_dict())
    options = {"per_device_train_batch_size": 8, "max_steps": 2, "report_to": [], "disable_tqdm": True}
    arguments = transformers.TrainingArguments(tmp_path, **options, use_cpu=True, save_strategy="no")
    trainer = Trainer(model, arguments, train_dataset=DATA)
    trainer.train()
    gaters = [name for name in before if ".gater." in name]
    assert gaters
    assert all(not torch.equal(model.state_dict()[name], before[name]) for name in gaters)
    calibrate_thresholds(model, [torch.stack([each["input_ids"] for each in DATA])])
    trainer.save_model(tmp_path / "saved")
    other = bert()
    saved = pytest.importorskip("safetensors.torch").load_file(tmp_path / "saved" / "model.safetensors")
    other.load_state_dict(saved)
    ids = DATA[0]["input_ids"][None]
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.cpu
def test_in_a_lightning_module(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, index):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y) + penalty(self.net)

        def validation_step(self, batch, index):
            with gatelet.sampling(self.net):  # not calibrated yet
                return self.net(batch[0]).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

    module = Module()
    before = module.net[1].gating.gater.gates.weight.clone()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, torch.arange(160) % 4), batch_size=16)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, loader, loader)
    assert not torch.equal(module.net[1].gating.gater.gates.weight, before)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Module.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(again.net[1].gating.gater.gates.weight, module.net[1].gating.gater.gates.weight)


@pytest.mark.parametrize("make", [lambda: layer(estimator="score_function"), lambda: mlp(estimator="score_function")])
def test_score_function_gates_under_plain_backward(make):
    model = make()
    with gatelet.Tape() as tape:
        losses = model(X).square().mean(-1)
    loss = tape.surrogate(losses).mean() + penalty(model)
    loss.backward()
    assert torch.equal(loss.detach() - penalty(model.eval()), loss.detach())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    gating = next(module for module in model.modules() if isinstance(module, gatelet.nn.ConditionalLayer))
    assert gating.gater.hidden.weight.grad.any()
