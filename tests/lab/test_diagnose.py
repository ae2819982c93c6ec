"""`gatelet diagnose`: the ready-made problems and the certificate."""

import io
import re

import pytest
import torch
import tyro
from rich.console import Console

import gatelet
from gatelet.diagnose.table import forms
from gatelet.estimators import ALL, LeaveOneOut, NoisyRectifier, ScoreFunction, StraightThrough
from gatelet_lab.commands import diagnose
from gatelet_lab.problems import certificate, polynomial, toy
from gatelet_lab.problems.options import Diagnose

FEW = ("leave_one_out", "straight_through")


def printed(options):
    console = Console(width=160, file=io.StringIO())
    diagnose.run(options, console)
    return console.file.getvalue()


def test_options_from_the_command_line():
    options = tyro.cli(Diagnose, args=["toy", "--estimators", "leave_one_out", "--budget", "time"])
    assert (options.problem, options.estimators, options.budget) == ("toy", ("leave_one_out",), "time")


# ---------------------------------------------------------------- the toy problem


def test_toy_numbers():
    rows = {row.what: row for row in toy.checks()}
    for row in rows.values():
        assert row.found == pytest.approx(row.known, rel=1e-9), row.what
    known = [float(f"{row.known:.2g}") for row in rows.values()]
    assert known == [0.01, 0.0089, 0.00041, *([0.00035] if "disarm" in ALL else []), -0.08]
    assert rows["exact gradient"].known == pytest.approx(0.0105, abs=1e-5)


def test_toy(tmp_path):
    text = printed(Diagnose("toy", FEW, samples=20, plot=tmp_path / "toy.png", out=tmp_path / "new" / "toy.md"))
    assert "variance, leave-one-out with 2" in text
    for target in ("0.45", "0.49", "0.499"):
        assert f"E[(b − t)²], t = {target}, logit -2" in text
    written = (tmp_path / "new" / "toy.md").read_text()
    assert written.startswith("# gatelet diagnose toy")
    assert written.count("recommended: leave_one_out") == 3
    assert (tmp_path / "toy.png").stat().st_size > 0


# ---------------------------------------------------------------- the polynomial


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0])
def test_polynomial_closed_forms(power):
    logits = torch.randn(1, 6)
    objective = polynomial.objective_of(power)
    exact = gatelet.exact_gradient(objective, logits)
    torch.testing.assert_close(polynomial.gradient_of(power, logits), exact, rtol=1e-5, atol=1e-7)
    value = gatelet.moments(objective, logits, ScoreFunction()).value
    assert polynomial.value_of(power, logits) == pytest.approx(value.item(), rel=1e-5)


def test_polynomial_trains_at_equal_evaluations(tmp_path):
    one = polynomial.train(2.0, StraightThrough("sigmoid"), 8, 100, 0.1, 1, 0)
    two = polynomial.train(2.0, LeaveOneOut(), 8, 100, 0.1, 2, 0)
    assert one.evaluations[-1] == two.evaluations[-1] == 100
    assert len(one.losses) == 101
    assert one.losses[-1] < one.losses[0]
    text = printed(Diagnose("polynomial", FEW, samples=20, steps=20, latents=8, plot=tmp_path / "p.png"))
    assert text.count("after training with 20 evaluations") == 3
    assert (tmp_path / "p.png").is_file()
    assert (tmp_path / "p-bias.png").is_file()


# ---------------------------------------------------------------- the network


def test_network(tmp_path):
    out = tmp_path / "network.md"
    options = Diagnose("network", FEW, samples=10, experts=12, bottleneck=4, batch=5, out=out)
    assert "layer layer.unit" in printed(options)
    assert "shape (5, 12)" in out.read_text()


# ---------------------------------------------------------------- the certificate


def test_certificate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed(Diagnose("certificate", (*FEW, "score_function"), samples=20))
    lines = (tmp_path / "runs" / "certificate.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    assert table[0][:3] == ["estimator", "bias declared", "bias found"]
    rows = {row[0]: row for row in table[2:]}
    assert len(rows) == sum(len(forms(ALL[name])) for name in (*FEW, "score_function"))
    assert rows["leave_one_out"][1] == "none"
    assert float(rows["leave_one_out"][2]) < 1e-12
    assert rows["straight_through(slope=sigmoid)"][1] == "biased"
    assert float(rows["straight_through(slope=sigmoid)"][2]) > 1e-3
    assert all(row[-1] == "enumeration" for row in rows.values())


def test_certified_by_quadrature_and_for_gates_of_its_own():
    row = certificate.certify("noisy_rectifier", NoisyRectifier(), 2)
    assert row.declared == "none (own objective)"
    assert row.bias < 1e-9
    assert re.fullmatch(r"quadrature, order \d+", row.how)
    assert 0 < row.error < 1e-8


def test_certified_by_monte_carlo_where_nothing_else_is_possible(monkeypatch):
    monkeypatch.setattr(certificate, "_MAX_OUTCOMES", 0)
    exact = gatelet.moments
    row = certificate.certify("leave_one_out", LeaveOneOut(), 2, samples=2000)
    assert row.how == "Monte Carlo"
    assert 0 < row.bias < row.error
    objective = certificate.standard_objectives(2)["quadratic"]
    variance = exact(objective, 1.5 * certificate._draw(7, 1, 2), "leave_one_out").variance.sum()
    assert row.variances["quadratic"] == pytest.approx(float(variance), rel=0.2)


def test_a_wrong_estimator_has_a_bias():
    class Wrong(LeaveOneOut):
        def coefficients(self, *args):
            return 1.3 * super().coefficients(*args)

    assert certificate.certify("wrong", Wrong(), 2).bias > 0.05


@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_certified_in_both_kinds(kind):
    row = certificate.certify("leave_one_out", LeaveOneOut(kind=kind), 3)
    assert row.bias < 1e-12
    assert row.evaluations == 2


def test_cases_walk_everything():
    assert len(certificate.cases()) == sum(len(forms(cls)) for cls in ALL.values())


# ---------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimators": ("leave_one",)}, "unknown estimator 'leave_one'; did you mean 'leave_one_out'"),
        ({"samples": 3}, "--samples must be at least 10"),
        ({"steps": 0}, "--steps must be an integer of at least 1"),
        ({"rate": 0.0}, "--rate must be a finite number above 0"),
        ({"units": 5}, "--units must be 2 or 3"),
        ({"problem": "certificate", "plot": "x.png"}, "--plot: the certificate is a table"),
    ],
)
def test_bad_inputs(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        printed(Diagnose(**({"problem": "toy"} | change)))


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out .*: cannot be written"):
        printed(Diagnose("toy", FEW, samples=20, out=tmp_path / "file" / "toy.md"))
