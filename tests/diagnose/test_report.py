"""gatelet.diagnose: known numbers, measured against exact ones, and what the report does with them."""

import builtins
import importlib
import math
import pickle
import sys
import types
from dataclasses import replace

import pytest
import torch
from jaxtyping import config

import gatelet
import gatelet.diagnose
from gatelet.diagnose import moments
from gatelet.estimators import ALL, LeaveOneOut, ScoreFunction, StraightThrough

TOY = torch.full((1, 1), -2.0)
FEW = ["score_function", "leave_one_out", "straight_through", "smooth_times_stochastic"]


def squares(h):
    return (h - 0.45).square().sum(-1)


def coupled(h):
    """Differentiable, with interactions and a target of its own per example."""
    target = torch.tensor([0.2, -0.4, 0.9])
    return (h.sum(-1) - 3 * h[..., 0] * h[..., -1] + target) ** 2


def logits(batch=3, units=4):
    return torch.randn(batch, units, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def as_user():
    """The shape checks of pytest switched off: what is raised then is what a user meets."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


# ---------------------------------------------------------------- the numbers


def test_the_toy_numbers_of_the_literature():
    report = gatelet.diagnose(
        squares,
        TOY.double(),
        {
            "plain": ScoreFunction(baseline="none"),
            "pairs": LeaveOneOut(),
            "through": StraightThrough(slope="sigmoid"),
        },
    )
    assert report.reference.item() == pytest.approx(0.0105, abs=1e-5)
    assert report["plain"].variance == pytest.approx(8.9e-3, rel=5e-3)
    assert report["pairs"].variance == pytest.approx(4.1e-4, rel=2e-2)
    assert (report["through"].mean - report.reference).item() == pytest.approx(-0.080, abs=1e-4)
    assert all(row.exact and row.bias_error == 0 for row in report.rows)
    assert report["plain"].bias < 1e-12
    assert report["through"].cosine == pytest.approx(-1)
    assert report["plain"].signal_to_noise == pytest.approx(0.0105 / math.sqrt(8.9e-3), rel=1e-2)
    assert report.recommendation.name == "pairs"


def test_squares_are_summed_over_units_and_averaged_over_examples():
    at = logits()
    row = gatelet.diagnose(coupled, at, [LeaveOneOut()], replicas=2)["leave_one_out"]
    found = moments(coupled, at, "leave_one_out", samples=2)
    assert row.variance == pytest.approx(float(found.variance.sum(-1).mean()))
    torch.testing.assert_close(row.mean, found.mean)
    biased = gatelet.diagnose(coupled, at, ["straight_through"])
    difference = biased["straight_through"].mean - gatelet.exact_gradient(coupled, at)
    assert biased["straight_through"].bias == pytest.approx(math.sqrt(difference.square().sum(-1).mean()))


@pytest.mark.parametrize("method", [ScoreFunction(baseline="none"), LeaveOneOut(), StraightThrough()])
def test_measured_agrees_with_exact_within_its_error(method):
    at = logits()
    exact = gatelet.diagnose(coupled, at, {"it": method})["it"]
    found = gatelet.diagnose(coupled, at, {"it": method}, samples=4000, exact=False)["it"]
    assert exact.exact
    assert not found.exact
    assert 0 < found.bias_error < 0.2 * math.sqrt(exact.variance)
    assert abs(found.bias - exact.bias) < 4 * found.bias_error
    assert float((found.mean - exact.mean).square().sum(-1).mean()) < (4 * found.bias_error) ** 2
    assert abs(found.variance - exact.variance) < 4 * found.variance_error
    assert found.evaluations == exact.evaluations


def test_too_many_units_are_compared_to_a_long_run():
    weight = torch.linspace(-1, 1, 30)

    def linear(h):
        return (h * weight).sum(-1)

    at = logits(2, 30)
    report = gatelet.diagnose(linear, at, ["leave_one_out", StraightThrough(slope="sigmoid")], samples=2000)
    known = weight * at.sigmoid() * (1 - at.sigmoid())
    error = math.sqrt((report.reference - known).square().sum(-1).mean())
    assert report.reference_error > 0
    assert error < 4 * report.reference_error
    assert "leave_one_out with 8 replicas" in report.reference_how
    # for a linear loss this one has no bias: what is seen of one is noise
    assert report["straight_through"].bias < 4 * report["straight_through"].bias_error
    assert gatelet.diagnose(linear, at, ["leave_one_out"], samples=50, reference=known).reference_how == "given"


def test_an_objective_with_noise_of_its_own_is_not_enumerated():
    report = gatelet.diagnose(lambda h: squares(h) + 0.1 * torch.randn(h.shape[:-1]), TOY, ["leave_one_out"], 200)
    assert report.reference_error > 0
    assert not report["leave_one_out"].exact


def test_the_seed_decides_and_torchs_own_generator_is_left_alone():
    before = torch.get_rng_state()
    first, second, other = (
        gatelet.diagnose(coupled, logits(), ["leave_one_out"], 100, exact=False, seed=seed)["leave_one_out"].mean
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_an_instance_keeps_its_state_and_a_name_is_warmed_up():
    method = ScoreFunction()
    report = gatelet.diagnose(squares, TOY, {"new": method, "used": "score_function"}, samples=100)
    assert method.numerator.numel() == 0
    assert report["used"].variance < 0.1 * report["new"].variance


def test_categorical_units():
    at = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.arange(6.0).reshape(2, 3)
    names = ["leave_one_out", "straight_through", "smooth_times_stochastic", ScoreFunction()]
    report = gatelet.diagnose(lambda h: (h * weight).flatten(-2).sum(-1) ** 2, at, names, kind="categorical")
    assert report["leave_one_out"].bias < 1e-6
    assert report["straight_through"].bias > 0.1
    assert report["smooth_times_stochastic"].left_out == "has no categorical form"
    assert report["score_function"].left_out == "is for bernoulli units, not categorical ones"


def test_every_estimator_has_a_row():
    report = gatelet.diagnose(coupled, logits(3, 2), list(ALL), samples=20, exact=False)
    assert [row.name for row in report.rows] == list(ALL)
    for row in report.rows:
        if "bernoulli" in ALL[row.name].kinds:
            assert row.left_out is None, (row.name, row.left_out)
            assert row.variance >= 0
            assert row.evaluations >= row.replicas
            assert row.milliseconds > 0
    assert len(gatelet.diagnose(coupled, logits(3, 2), samples=20).rows) < len(ALL)


# ---------------------------------------------------------------- cost and budget


def test_evaluations_are_counted():
    for replicas in (2, 6):
        assert gatelet.diagnose(coupled, logits(), FEW, 20, replicas=replicas)["leave_one_out"].evaluations == replicas
    assert gatelet.diagnose(coupled, logits(), ["straight_through", "leave_one_out"], 20)["leave_one_out"].replicas == 2


@pytest.mark.parametrize("budget", ["evaluations", "time"])
def test_at_equal_budget_every_estimator_costs_the_same(budget):
    report = gatelet.diagnose(coupled, logits(), FEW, 20, budget)
    assert report.amount == max(row.cost(budget) for row in report.rows)
    for row in report.rows:
        assert row.calls * row.cost(budget) == pytest.approx(report.amount)
        assert row.budget_variance == pytest.approx(row.variance / row.calls)
        assert row.mean_squared_error == pytest.approx(row.bias**2 + row.variance / row.calls)
        assert row.variance_per_evaluation == pytest.approx(row.variance * row.evaluations)
    if budget == "evaluations":
        assert report.amount == 2
        assert [row.calls for row in report.rows] == [2, 1, 2, 2]


# ---------------------------------------------------------------- estimators that do not suit


def test_what_needs_a_derivative_says_so_where_there_is_none():
    report = gatelet.diagnose(lambda h: (h.detach() > 0.5).float().sum(-1), TOY, FEW, 20)
    assert "needs a differentiable objective" in report["straight_through"].left_out
    assert report["leave_one_out"].left_out is None
    assert "straight_through: left out: needs a differentiable objective" in repr(report)
    assert math.isnan(report["straight_through"].variance)
    assert len(report.measured) == 2


def test_an_objective_that_vmap_does_not_know_is_measured():
    def stubborn(h):
        return torch.stack([torch.tensor([squares(one).item()]) for one in h.flatten(0, -2)]).reshape(h.shape[:-1])

    row = gatelet.diagnose(stubborn, TOY, ["leave_one_out"], 100)["leave_one_out"]
    assert not row.exact
    assert row.left_out is None


# ---------------------------------------------------------------- the recommendation


def test_the_biased_one_is_recommended_where_its_error_is_clearly_smaller():
    weight = torch.linspace(1, 2, 12)
    linear = {"biased": StraightThrough(slope="sigmoid"), "unbiased": LeaveOneOut()}
    report = gatelet.diagnose(lambda h: (h * weight).sum(-1) + 0.01 * h.sum(-1) ** 2, logits(1, 12), linear, 200)
    assert report.recommendation.name == "biased"
    assert "clearly smaller" in report.recommendation.reason
    assert "which wins where a step averages more than" in report.recommendation.reason
    unseen = replace(report, rows=tuple(replace(row, bias=0.0, bias_error=1e-3) for row in report.rows))
    assert unseen.recommendation.name == "biased"  # as a measured bias is where noise hides it
    assert "at most" in unseen.recommendation.reason
    assert "wins" not in unseen.recommendation.reason
    toy = gatelet.diagnose(squares, TOY, linear, 20)
    assert toy.recommendation.name == "unbiased"
    assert "has no clearly smaller mean squared error" in toy.recommendation.reason
    assert "none of these is unbiased" in gatelet.diagnose(squares, TOY, ["straight_through"], 20).recommendation.reason
    nothing = gatelet.diagnose(lambda h: squares(h.detach()), TOY, ["straight_through"], 20)
    assert nothing.recommendation is None
    assert "left out" in repr(nothing)


@pytest.mark.parametrize(
    ("objective", "estimators", "kind", "best"),
    [
        # A linear loss leaves double control variates no variance. ZGR is exact for squares of each gate, SIMPLE for
        # linear losses; a derivative says more than a loss.
        ("linear", ["leave_one_out", "disarm", "bit_flip", "double_control_variates"], {}, "double_control_variates"),
        ("squares", ["leave_one_out", "score_function", "darn", "imle", "zgr"], {}, "zgr"),
        ("linear", ["leave_one_out", "score_function", "imle", "simple"], {"kind": "subset", "k": 2}, "simple"),
    ],
)
def test_the_second_generation_is_recommended_where_it_is_best(objective, estimators, kind, best):
    weight = torch.linspace(1, 2, 4)
    losses = {"linear": lambda h: (h * weight).sum(-1), "squares": lambda h: (h + 2).square().sum(-1)}
    report = gatelet.diagnose(losses[objective], logits(1, 4), estimators, 400, **kind)
    assert not [row.name for row in report.rows if row.left_out is not None]
    assert report.recommendation.name == best


# ---------------------------------------------------------------- the report as an object


def test_repr_is_an_aligned_table():
    text = repr(gatelet.diagnose(coupled, logits(), FEW, 20, "evaluations"))
    lines = text.splitlines()
    assert lines[0].startswith("reference: exact gradient by enumeration; shape (3, 4), averaged to 2 evaluations")
    assert len({len(line) for line in lines[1:6]}) == 1
    assert lines[1].split()[-3:] == ["mse", "at", "budget"]
    assert lines[6].startswith("recommended: ")
    assert lines[7].startswith("  ")
    assert max(map(len, lines[7:])) <= 88, "the reason is wrapped"


def test_dataframe(monkeypatch):
    report = gatelet.diagnose(coupled, logits(), ["leave_one_out", LeaveOneOut()], 20)
    assert [record["estimator"] for record in report.records()] == ["leave_one_out", "leave_one_out #2"]
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda records: ("frame", records)))
    assert report.to_dataframe() == ("frame", report.records())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_dataframe needs pandas"):
        report.to_dataframe()


def test_dataframe_of_pandas():
    pytest.importorskip("pandas")
    frame = gatelet.diagnose(coupled, logits(), FEW, 20).to_dataframe()
    assert list(frame["estimator"]) == FEW
    assert frame["variance"].gt(0).all()


@pytest.mark.parametrize("budget", [None, "time"])
def test_plot(tmp_path, budget):
    pytest.importorskip("matplotlib")
    gatelet.diagnose(coupled, logits(), FEW, 20, budget).plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_plot_shows_the_whole_legend(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: (save(self, *a, **k), drawn.append(self)))
    names = {f"estimator {index}": "straight_through" for index in range(40)}
    gatelet.diagnose(coupled, logits(), names, 20).plot(tmp_path / "report.png")
    (legend,) = drawn[0].legends
    assert len(legend.get_texts()) == 40
    assert legend.get_window_extent().y0 >= 0


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    report = gatelet.diagnose(squares, TOY, FEW, 20)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="plot needs matplotlib"):
        report.plot(tmp_path / "report.png")


def test_the_public_name_is_the_function_and_the_package_is_imported_from():
    assert isinstance(gatelet.diagnose, types.FunctionType)
    package = importlib.import_module("gatelet.diagnose")
    assert package.diagnose is gatelet.diagnose
    assert package.moments is gatelet.moments is moments
    assert pickle.loads(pickle.dumps(gatelet.diagnose)) is gatelet.diagnose


# ---------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"estimators": ["leave_one_ou"]},
            ValueError,
            "unknown estimator 'leave_one_ou'; did you mean 'leave_one_out'",
        ),
        ({"estimators": []}, ValueError, "estimators: name at least one"),
        ({"estimators": "leave_one_out"}, TypeError, "estimators must be a sequence"),
        ({"estimators": [LeaveOneOut]}, TypeError, "estimators must hold names and instances"),
        ({"budget": "evaluation"}, ValueError, "unknown budget 'evaluation'; did you mean 'evaluations'"),
        ({"samples": 9}, ValueError, "samples must be at least 10"),
        ({"samples": 1.5}, ValueError, "samples must be an integer"),
        ({"replicas": 0}, ValueError, "replicas must be an integer of at least 1"),
        ({"kind": "gaussian"}, ValueError, "unknown kind 'gaussian'"),
        ({"kind": "categorical", "logits": torch.zeros(3)}, ValueError, "logits of categorical units"),
        ({"logits": torch.zeros(0, 3)}, ValueError, "logits must not be empty"),
        ({"logits": torch.tensor([math.nan])}, ValueError, "logits holds 1 values that are NaN"),
        ({"reference": torch.zeros(2, 2)}, ValueError, "reference must have the logits' shape"),
        ({"objective": lambda h: h}, ValueError, "objective must map gates"),
        ({"objective": lambda h: h @ torch.zeros(7)}, RuntimeError, "size mismatch"),
    ],
)
def test_bad_inputs(change, error, message, as_user):
    with pytest.raises(error, match=message):
        gatelet.diagnose(**({"objective": squares, "logits": TOY, "samples": 20} | change))


def test_an_unknown_row():
    with pytest.raises(ValueError, match="unknown row 'leave_one'; did you mean 'leave_one_out'"):
        gatelet.diagnose(squares, TOY, ["leave_one_out"], 20)["leave_one"]
