"""distil_output: what it reaches, what it leaves alone, resumes, refuses."""

import copy
from types import SimpleNamespace

import pytest
import torch
from test_distil import data, pair
from torch import nn

import gatelet
from gatelet.convert import blocks
from gatelet.convert.distil_output import distil_output


class WithLogits(nn.Module):
    """A model whose output has logits, as those of transformers."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, attention_mask=None):
        return SimpleNamespace(logits=self.net(x))


def converted(gater="preview", rate=0.25, logits=False, **options):
    model, teacher = pair(rate=rate, gater=gater, **options)
    gatelet.distil(model, teacher, data(), steps=30, held_out=2, progress=False)
    return (WithLogits(model), WithLogits(teacher)) if logits else (model, teacher)


def tune(model, teacher, loader=None, **options):
    given = {"steps": 60, "lr": 3e-3, "held_out": 2, "every": 20, "progress": False}
    return distil_output(model, teacher, loader or data(), **given | options)


@pytest.mark.parametrize("gater", ["preview", "mlp"])
def test_the_output_comes_nearer_with_as_many_open(gater):
    model, teacher = converted(gater)
    gaters = copy.deepcopy([gating.gater.state_dict() for _, gating in blocks(model).values()])
    x = data(30)[-1]
    before = (model(x) - teacher(x)).square().mean()
    found = tune(model, teacher)
    assert (model(x) - teacher(x)).square().mean() < 0.6 * before
    assert found.errors["output"] < 0.6 * found.first_errors["output"]
    assert found.open_share == pytest.approx(dict.fromkeys(blocks(model), 0.25), abs=0.02)
    for (_, gating), was in zip(blocks(model).values(), gaters, strict=True):
        assert all(torch.equal(value, was[name]) for name, value in gating.gater.state_dict().items())


def test_better_than_blocks_by_themselves():
    model, teacher = converted()
    alone = copy.deepcopy(model)
    gatelet.distil(alone, teacher, data(), steps=60, weights=True, weights_lr=3e-3, held_out=2, progress=False)
    tune(model, teacher)
    x = data(30)[-1]
    together, each = ((one(x) - teacher(x)).square().mean() for one in (model, alone))
    assert together < each


def test_only_the_blocks_maps_and_thresholds_change():
    model, teacher = converted()
    model.append(nn.Linear(4, 4))
    teacher.append(copy.deepcopy(model[-1]))
    model[0].bias.requires_grad_(False)
    before, dense = copy.deepcopy(model.state_dict()), copy.deepcopy(teacher.state_dict())
    tune(model.train(), teacher, steps=3)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    maps = {f"{index}.{part}" for index in (0, 2, 3, 5) for part in ("weight", "bias")}
    assert maps <= changed <= maps | {name for name in before if name.endswith("threshold")}
    assert all(torch.equal(value, dense[name]) for name, value in teacher.state_dict().items())
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.bias"]
    assert all(p.grad is None for p in [*model.parameters(), *teacher.parameters()])


def test_the_loss_of_logits_is_their_divergence():
    model, teacher = converted(logits=True)
    batch = data()[:2]
    found = tune(model, teacher, data(), steps=1, lr=1e-9, calibration=1)
    with torch.no_grad():
        p, q = ([one(x).logits.double().softmax(-1) for x in batch] for one in (teacher, model))
    want = sum((a * (a.log() - b.log())).sum(-1).mean() for a, b in zip(p, q, strict=True)) / 2
    assert found.first_errors["output"] == pytest.approx(want.item(), rel=1e-2)


def test_padding_counts_nowhere():
    model, teacher = converted(logits=True)
    other = copy.deepcopy(model)
    clean, dirty = [], []
    for x in data(6):
        x, kept = x.view(8, 8, 16), (torch.arange(8) < 6).expand(8, 8)
        clean.append({"x": x, "attention_mask": kept})
        dirty.append({"x": torch.where(kept[..., None], x, 100.0), "attention_mask": kept})
    one, two = tune(model, teacher, clean, steps=3), tune(other, teacher, dirty, steps=3)
    assert one.first_errors == pytest.approx(two.first_errors)
    assert one.errors == pytest.approx(two.errors)


def test_steps_in_bfloat16():
    model, teacher = converted()
    found = tune(model, teacher, autocast=torch.bfloat16)
    assert found.errors["output"] < 0.7 * found.first_errors["output"]
    assert model[0].weight.dtype is torch.float32


def test_resumes_where_it_stopped(tmp_path):
    whole, teacher = converted()
    stopped = copy.deepcopy(whole)
    tune(whole, teacher, steps=40)
    asked = {"steps": 40, "checkpoint": tmp_path / "output.pt"}
    batches, seen = data(), []

    def breaks(model, batch):
        seen.append(model)
        if sum(each is teacher for each in seen) > 30 and torch.is_grad_enabled():
            raise KeyboardInterrupt
        return model(batch)

    with pytest.raises(KeyboardInterrupt):
        tune(stopped, teacher, batches, forward=breaks, **asked)
    again = copy.deepcopy(stopped)
    for _, gating in blocks(again).values():
        gating.unit.threshold.fill_(1.0)
    tune(again, teacher, batches, **asked)
    for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_refusals():
    model, teacher = converted()
    with pytest.raises(ValueError, match="loader: must allow several passes"):
        tune(model, teacher, iter(data()))
    with pytest.raises(ValueError, match="steps"):
        tune(model, teacher, steps=0)
    with pytest.raises(ValueError, match="lr"):
        tune(model, teacher, lr=0.0)
    with pytest.raises(ValueError, match="model: holds no converted block"):
        tune(teacher, teacher)
    with pytest.raises(ValueError, match="loader: must yield more than the 2 batches that are held out"):
        tune(model, teacher, data(2))
    with pytest.raises(ValueError, match=r"teacher: gives an output of \(64, 16\), the model of \(64, 4\)"):
        tune(model, teacher[:3])
    for converted_too in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"teacher: its block '0\.gating' is converted too"):
            tune(model, converted_too)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="distil output: it trains"):
        tune(model, teacher)
    with pytest.raises(FloatingPointError, match=r"distil output: .* back at its best state"):
        tune(model, teacher, lr=1e30, steps=3)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_scale_survives_a_resumed_distil(tmp_path):
    model, teacher = pair(gater="preview")
    with torch.no_grad():
        for net in (model, teacher):  # W2's columns differ, so that the scale matters
            net[5].weight *= torch.linspace(0.1, 2.0, 64)
    asked = {"steps": 4, "every": 2, "held_out": 2, "weights": True, "checkpoint": tmp_path / "distil.pt"}
    gatelet.distil(model, teacher, data(), **asked)
    scale = model[3].gating.gater.scale.clone()
    assert not torch.equal(scale, torch.ones_like(scale))
    again = copy.deepcopy(model)
    again[3].gating.gater.scale.fill_(1.0)
    gatelet.distil(again, teacher, data(), **asked)
    assert torch.equal(again[3].gating.gater.scale, scale)
