"""Options that are booleans, not finite or too large are refused by their names."""

import inspect

import pytest
import torch
from jaxtyping import config

import gatelet
import gatelet.estimators
import gatelet.nn
import gatelet.sparsity
from gatelet._checks import check_count, check_finite, check_positive, check_rate, check_weight
from gatelet_lab.training.recipes import ROWS
from gatelet_lab.training.settings import KEYS, number, override

ARGUMENTS = {
    "ConditionalFFN": {"d_model": 8, "d_ff": 16, "bottleneck": 4},
    "ConditionalLinear": {"in_features": 8, "out_features": 16, "bottleneck": 4},
    "Gater": {"in_features": 8, "num_gates": 4, "bottleneck": 2},
    "ConditionalLayer": {"in_features": 8, "units": 64, "bottleneck": 2, "flops_per_unit": 64},
    "SelfGater": {"in_features": 8, "num_gates": 8},
    "PreviewGater": {"in_features": 8, "num_gates": 8},
    "TwoStageGater": {"in_features": 8, "num_gates": 16, "bottleneck": 4},
    "SparseAutoencoder": {"d_in": 8, "d_sae": 16, "k": 2},
    "RowAdam": {"params": [torch.nn.Parameter(torch.zeros(3, 3))]},
    "StochasticUnit": {"estimator": "straight_through"},
    **{
        name: {"target_rate": 0.2}
        for name in ("AdaptiveL1", "BetaNoise", "FiringRateBias", "KLRate", "StatisticalTopK")
    },
}
BAD = (True, False, float("nan"), float("inf"), -float("inf"), 10**400)


@pytest.fixture(autouse=True)
def _no_types_checked():
    """What users run: without the run-time type checker of these tests, which refuses some of it by itself."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def options():
    """Yield every option that is a number, of every public class."""
    seen = set()
    for module in (gatelet, gatelet.nn, gatelet.sparsity, gatelet.estimators):
        for name, made in vars(module).items():
            ours = inspect.isclass(made) and made.__module__.startswith("gatelet.") and not name.startswith("_")
            if not ours or made in seen or (name not in ARGUMENTS and module is not gatelet.estimators):
                continue
            seen.add(made)
            for each in inspect.signature(made).parameters.values():
                kind = str(each.annotation).replace(" | None", "").replace(" | torch.Tensor", "")
                if kind in ("<class 'int'>", "<class 'float'>", "int", "float"):
                    yield pytest.param(made, each.name, id=f"{name}.{each.name}")


@pytest.mark.parametrize(("made", "option"), list(options()))
def test_no_class_takes_what_is_no_number(made, option):
    given = ARGUMENTS.get(made.__name__, {})
    for bad in BAD:
        with pytest.raises(ValueError, match=option) as error:
            made(**{**given, option: bad})
        assert len(str(error.value)) < 200


def test_all_classes_are_looked_at():
    assert {each.values[0].__name__ for each in options()} >= set(ARGUMENTS)
    assert len(list(options())) > 60


@pytest.mark.parametrize("check", [check_count, check_finite, check_positive, check_rate, check_weight])
def test_checks_of_numbers(check):
    for bad in (*BAD, "1", None, 1j):
        with pytest.raises(ValueError, match=r"^that must"):
            check(bad, "that")


def test_settings_of_a_recipe():
    recipe = ROWS["straight_through"]()
    for key in KEYS:
        if number(key) is None:
            continue
        for bad in ("true", "nan", "inf", "1" + 400 * "0"):
            with pytest.raises(ValueError, match=key):
                override(recipe, [f"{key}={bad}"])
