"""The VAE: its ELBO against enumeration, equal budgets, resuming, errors that name the argument."""

import itertools
import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console

from gatelet.estimators import ALL
from gatelet_lab import data
from gatelet_lab.commands import train_vae
from gatelet_lab.commands.train_vae import TrainVAE
from gatelet_lab.files import CheckpointError
from gatelet_lab.training import vae

SMALL = TrainVAE(
    estimators=("score_function", "straight_through"),
    latents=3,
    evaluations=2,
    steps=4,
    every=2,
    draws=8,
    batch=10,
    dataset="digits",
)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def split():
    return data.load("digits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    options = replace(SMALL, out=tmp_path_factory.mktemp("vae") / "out")
    train_vae.run(options, QUIET)
    return options


def outcomes(n):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)))


def log_mass(logits, bits):
    return torch.distributions.Bernoulli(logits=logits).log_prob(bits).sum(-1)


def model(layers, pixels=5, latents=3):
    torch.manual_seed(0)
    made = vae.VAE(torch.rand(pixels), latents, layers)
    torch.nn.init.normal_(made.prior)
    return made.double()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_negative_elbo_is_the_definition(layers):
    """E_q[log q(h) − log p(h) − log p(x|h)], every term spelled out over all outcomes."""
    net = model(layers)
    x = torch.bernoulli(torch.full((2, 5), 0.5)).double()
    a = net.encode(x)
    wanted, found = torch.zeros(2).double(), net.analytic(a)
    for h in outcomes(3).double():
        chance = log_mass(a, h).exp()
        seen = log_mass(net.decoder(2 * h - 1), x)
        if layers == 1:
            wanted += chance * (log_mass(a, h) - log_mass(net.prior, h) - seen)
            found = found + chance * net.reconstruction(h.expand(2, 3), x)
            continue
        above = net.upper_encoder(2 * h - 1)
        for top in outcomes(3).double():
            both = chance * log_mass(above, top).exp()
            prior = log_mass(net.prior, top) + log_mass(net.upper_decoder(2 * top - 1), h)
            wanted += both * (log_mass(a, h) + log_mass(above, top) - prior - seen)
            upper = net.upper(h.expand(2, 3), lambda _, top=top: top.expand(2, 3))
            found = found + both * (net.reconstruction(h.expand(2, 3), x) + upper)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_every_estimator_trains_or_says_why_not(name, layers, split, tmp_path):
    options = replace(SMALL, estimators=(name,), layers=layers, evaluations=16, draws=2, out=tmp_path)
    (tmp_path / "checkpoints").mkdir()
    reason = (
        "categorical"
        if "bernoulli" not in ALL[name].kinds
        else "K-sample bound"
        if name == "vimco"
        else "single stochastic layer"
        if layers == 2 and (ALL[name].needs == "objective" or not ALL[name].several_layers)
        else None
    )
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            train_vae.plan(options)
        return
    (job,) = train_vae.plan(options)
    trainer = vae.VAETrainer(options, job, split)
    before = trainer.model.encoder.weight.clone()
    trainer.step(trainer.draw(0))
    assert not torch.equal(trainer.model.encoder.weight, before)
    row = trainer.look()
    assert all(torch.isfinite(torch.tensor(float(value))) for value in asdict(row).values())


def test_the_gradient_of_the_training_loss_is_that_of_the_elbo(split, tmp_path):
    """With enumeration as estimator, for all parameters; by way of the loss that training differentiates."""
    options = replace(SMALL, estimators=("enumeration",), evaluations=8, out=tmp_path)
    (job,) = train_vae.plan(options)
    trainer = vae.VAETrainer(options, job, split)
    net = trainer.model
    torch.nn.init.normal_(net.prior)
    x = trainer.shown[0][:4]
    a = net.encode(x)
    loss = trainer.stochastic(x, a, list(trainer.units), trainer.generator(0)) + net.analytic(a)
    found = torch.autograd.grad(loss.sum(), net.encoder.weight)[0]
    a = net.encode(x)
    exact = sum(
        (log_mass(a, h).exp() * (log_mass(a, h) - log_mass(net.prior, h) - log_mass(net.decoder(2 * h - 1), x))).sum()
        for h in outcomes(3)
    )
    wanted = torch.autograd.grad(exact, net.encoder.weight)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_all_spend_at_most_the_budget_and_as_much_as_they_can():
    spent = {}
    for name in ("score_function", "leave_one_out", "disarm", "rebar", "muprop", "local_expectation"):
        options = replace(SMALL, estimators=(name,), latents=4, evaluations=11)
        (job,) = train_vae.plan(options)
        spent[name] = (job.samples, train_vae.evaluations(name, 4, job.samples))
    assert spent == {
        "score_function": (11, 11),
        "leave_one_out": (11, 11),
        "disarm": (10, 10),
        "rebar": (3, 9),
        "muprop": (10, 11),
        "local_expectation": (2, 10),
    }


def test_variance_and_bias_are_those_of_the_moments(split, tmp_path):
    """Leave-one-out is unbiased and straight-through is not; the plain score function has the largest variance."""
    names = ("leave_one_out", "score_function:baseline=none", "straight_through")
    options = replace(SMALL, estimators=names, evaluations=2, draws=600, steps=1, out=tmp_path / "out")
    train_vae.run(options, QUIET)
    plain, loo, straight = (
        {row["estimator"]: row for row in json.loads((options.out / "table.json").read_text())["rows"]}[name]
        for name in (names[1], names[0], names[2])
    )
    assert plain["variance_same_weights"] > 5 * loo["variance_same_weights"]
    assert loo["relative_bias"] < 4 * loo["relative_noise"]
    assert straight["relative_bias"] > 10 * straight["relative_noise"]
    assert loo["unbiased"]
    assert not straight["unbiased"]


def test_the_output_is_complete(finished):
    content = json.loads((finished.out / "table.json").read_text())
    assert [row["estimator"] for row in content["rows"]] == list(SMALL.estimators)
    assert [row["step"] for row in content["rows"][0]["history"]] == [0, 2, 4]
    assert {"samples", "evaluations", "train_elbo", "valid_elbo", "variance", "ms_per_step"} <= set(content["rows"][0])
    assert (finished.out / "table.md").read_text().count("\n| ") == 4
    assert (finished.out / "vae.png").read_bytes().startswith(b"\x89PNG")
    starts = [row["history"][0]["valid_elbo"] for row in content["rows"]]
    assert starts[0] == starts[1]  # the same initial weights, the same images


def rows(options):
    found = json.loads((options.out / "table.json").read_text())["rows"]
    for row in found:
        row.pop("ms_per_step")
        for report in row["history"]:
            report.pop("seconds")
    return found


def test_an_extended_run_is_an_uninterrupted_one(finished, tmp_path):
    short = replace(finished, out=tmp_path / "out", steps=2)
    train_vae.run(short, QUIET)
    train_vae.run(replace(finished, out=tmp_path / "out", resume=True), QUIET)
    assert rows(replace(finished, out=tmp_path / "out")) == rows(finished)


def test_two_layers_and_seeds(tmp_path):
    options = replace(
        SMALL, estimators=("leave_one_out", "reinmax"), layers=2, seeds=2, latents=5, out=tmp_path / "out"
    )
    train_vae.run(options, QUIET)
    content = json.loads((options.out / "table.json").read_text())
    assert [(row["estimator"], row["seed"]) for row in content["rows"]] == [
        (name, seed) for name in options.estimators for seed in (0, 1)
    ]
    assert "relative_bias" not in content["rows"][0]
    assert "±" in (options.out / "table.md").read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"estimators": ()}, "--estimators"),
        ({"estimators": ("disarmed",)}, "did you mean 'disarm'"),
        ({"estimators": ("reinmax", "reinmax")}, "--estimators: names one twice"),
        ({"estimators": ("reinmax:temperature",)}, "name:option=value"),
        ({"estimators": ("reinmax:heat=1",)}, "heat"),
        ({"estimators": ("reinmax:temperature=0",)}, "temperature"),
        ({"evaluations": 1, "estimators": ("disarm",)}, "--evaluations 1: disarm needs at least 2"),
        ({"steps": 0}, "--steps"),
        ({"draws": 1}, "--draws"),
        ({"rate": 0.0}, "--rate"),
        ({"device": "abacus"}, "--device abacus"),
        ({"dataset": "nowhere"}, "nowhere"),
    ],
)
def test_bad_options_name_the_argument(change, told, tmp_path):
    with pytest.raises((ValueError, data.DataError), match=re.escape(told)):
        train_vae.run(replace(SMALL, out=tmp_path / "out", **change), QUIET)
    assert not (tmp_path / "out").exists()


def test_the_output_directory_is_guarded(finished, tmp_path):
    with pytest.raises(ValueError, match="--resume"):
        train_vae.run(finished, QUIET)
    with pytest.raises(ValueError, match="latents 3, not 4"):
        train_vae.run(replace(finished, latents=4, resume=True), QUIET)
    with pytest.raises(ValueError, match="--steps 2"):
        train_vae.run(replace(finished, steps=2, resume=True), QUIET)
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="not the output of"):
        train_vae.run(replace(SMALL, out=tmp_path, resume=True), QUIET)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not a directory"):
        train_vae.run(replace(SMALL, out=tmp_path / "file"), QUIET)


def test_a_damaged_checkpoint_is_named(tmp_path):
    options = replace(SMALL, estimators=("reinmax",), out=tmp_path / "out")
    train_vae.run(options, QUIET)
    (path,) = (options.out / "checkpoints").glob("*.pt")
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=path.name):
        train_vae.run(replace(options, resume=True), QUIET)
