"""StochasticUnit: its two modes, its threshold, its state, and what it says about bad arguments."""

import copy
import io
import math
import pickle

import pytest
import torch
from jaxtyping import config

import gatelet
from gatelet import StochasticUnit, Tape, sampling
from gatelet.estimators import ALL, Estimator, ScoreFunction, SmoothTimesStochastic
from gatelet.estimators._noise import NONE

# what runs with one sample per example (those that need several have their tests in test_tape)
MODULES = {
    name: kind
    for name, kind in ALL.items()
    if kind.needs != "objective" and not kind.antithetic and name not in ("arms", "carms")
}
NOISY = [name for name, kind in MODULES.items() if kind().law != NONE]
every = pytest.mark.parametrize("name", MODULES)
noisy = pytest.mark.parametrize("name", NOISY)
rated = pytest.mark.parametrize(
    "name", [name for name in MODULES if ALL[name].rated or name in ("sigmoid", "noisy_sigmoid")]
)


def draw(unit: StochasticUnit, logits: torch.Tensor) -> torch.Tensor:
    return unit.estimator.draw_noise(logits[None])[0]


@pytest.fixture
def as_user():
    """The shape checks of pytest switched off: what is raised then is what a user meets."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


# ---------------------------------------------------------------- training


@every
def test_training_gates_are_the_estimators(name):
    unit, logits = StochasticUnit(name), torch.randn(3, 5)
    noise = draw(unit, logits)
    assert torch.equal(unit(logits, noise=noise), unit.estimator(logits, noise))


@noisy
def test_training_draws_fresh_noise_from_the_generator_only(name):
    unit, logits = StochasticUnit(name), torch.randn(4, 50)
    first = unit(logits, generator=torch.Generator().manual_seed(3))
    again = unit(logits, generator=torch.Generator().manual_seed(3))
    other = unit(logits, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(unit(logits), unit(logits))
    state = torch.get_rng_state()
    unit(logits, generator=torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())


@noisy
def test_global_seed_reproduces(name):
    unit, logits = StochasticUnit(name), torch.randn(4, 50)
    torch.manual_seed(7)
    first = unit(logits)
    torch.manual_seed(7)
    assert torch.equal(first, unit(logits))


@every
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_any_leading_shape(name, shape, training):
    unit = StochasticUnit(name).train(training)
    if name in ("top_k", "simple") and shape[-1] == 0:
        with pytest.raises(ValueError, match=r"k = 1 .*, but there are 0"):
            unit(torch.randn(shape))
        return
    assert unit(torch.randn(shape)).shape == shape


# ---------------------------------------------------------------- eval


@every
def test_eval_is_deterministic_and_ignores_noise(name):
    unit, logits, noise = StochasticUnit(name).eval(), torch.randn(4, 20), torch.rand(4, 20)
    state = torch.get_rng_state()
    gates = unit(logits)
    assert torch.equal(gates, unit(logits, noise=noise))
    assert torch.equal(gates, unit(logits, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(state, torch.get_rng_state())


@rated
@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_open_iff_fire_probability_exceeds_threshold(name, threshold, dtype):
    unit = StochasticUnit(name, threshold=threshold).eval().to(dtype)
    logits = torch.linspace(-12, 12, 4001, dtype=dtype)[None]
    probability = unit.estimator.fire_probability(logits.double())
    clear = (probability - threshold).abs() > 1e-5  # the threshold's logit is rounded to float32
    is_open = unit(logits) != 0
    assert torch.equal(is_open[clear], probability[clear] > threshold)


@rated
def test_gate_at_the_threshold_is_closed(name):
    unit = StochasticUnit(name, threshold=0.5).eval()
    if unit.threshold.isfinite():
        assert unit(unit.threshold.reshape(1, 1)).item() == 0
        above = torch.nextafter(unit.threshold, torch.tensor(math.inf)).reshape(1, 1)
        assert unit(above).item() > 0


@rated
def test_open_value(name):
    unit, logits = StochasticUnit(name).eval(), torch.tensor([[0.3, 2.0, 9.0]])
    assert torch.equal(unit(logits), unit.estimator.open_value(logits))
    if unit.estimator.binary:
        assert torch.equal(unit(logits), torch.ones(1, 3))


@rated
def test_saturated_logits_are_still_ranked(name):
    unit = StochasticUnit(name).eval()
    logits = torch.tensor([[40.0, 50.0, 60.0, 70.0]])
    probability = unit.estimator.fire_probability(logits)
    assert torch.equal(probability, torch.ones_like(probability))
    unit.threshold.fill_(50.0)
    assert (unit(logits) != 0).tolist() == [[False, False, True, True]]


def test_sts_threshold_is_one_on_the_firing_probability():
    unit = StochasticUnit("smooth_times_stochastic", threshold=0.5).eval()
    gates = unit(torch.tensor([0.24, 0.26]).logit())  # sqrt(p) is the probability to fire
    assert gates[0] == 0
    torch.testing.assert_close(gates[1], torch.tensor(0.26))


@every
def test_eval_is_differentiable_where_the_open_value_is(name):
    unit, logits = StochasticUnit(name).eval(), torch.tensor([[-3.0, 2.0]], requires_grad=True)
    gates = unit(logits)
    expected = torch.autograd.functional.jacobian(unit.estimator.open_value, logits.detach())[0, 1, 0, 1]
    if gates.requires_grad:
        gates[0, 1].backward()
        torch.testing.assert_close(logits.grad[0, 1], expected)
    else:
        assert expected == 0


def test_uncalibrated_eval_is_an_error_that_says_what_to_do():
    unit = StochasticUnit("straight_through", threshold=None)
    unit(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match=r"no test-time threshold yet.*calibrate_thresholds.*sampling"):
        unit.eval()(torch.zeros(1, 2))


# ---------------------------------------------------------------- sampling()


@noisy
def test_sampling_samples_in_eval(name):
    net = torch.nn.Sequential(StochasticUnit(name, threshold=None), torch.nn.Identity()).eval()
    logits = torch.zeros(4, 50)
    noise = draw(net[0], logits)
    with torch.no_grad(), sampling(net):
        assert not torch.equal(net(logits), net(logits))
        assert torch.equal(net[0](logits, noise=noise), net[0].estimator(logits, noise))


def test_sampling_restores_after_exceptions_and_nests():
    a, b = StochasticUnit("straight_through"), StochasticUnit("straight_through")
    net = torch.nn.Sequential(a, b).eval()
    b.sample_in_eval = True
    with pytest.raises(KeyError), sampling(net):
        raise KeyError
    assert (a.sample_in_eval, b.sample_in_eval) == (False, True)
    with sampling(net):
        with sampling(a, on=False):
            assert torch.equal(a(torch.zeros(9)), torch.zeros(9))
        assert a.sample_in_eval
    assert not a.sample_in_eval
    assert not a.training
    assert torch.equal(a(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))


# ---------------------------------------------------------------- state


@every
def test_state_dict_holds_the_threshold(name):
    unit = StochasticUnit(name)
    unit.threshold.fill_(1.25)
    fresh = StochasticUnit(name, threshold=None)
    fresh.load_state_dict(unit.state_dict(), strict=True)
    assert fresh.threshold == 1.25
    logits = torch.linspace(-3, 3, 40)[None]
    assert torch.equal(unit.eval()(logits), fresh.eval()(logits))


def used_score_unit(units=4, **options) -> StochasticUnit:
    unit = StochasticUnit(ScoreFunction(**options))
    with Tape() as tape:
        unit(torch.randn(8, units, requires_grad=True))
    tape.surrogate(torch.rand(8) + 1)
    return unit


@pytest.mark.parametrize("baseline", ["per_unit", "running_mean", "none"])
@pytest.mark.parametrize("assign", [False, True])
def test_lazily_sized_buffers_load_before_first_use(baseline, assign):
    unit = used_score_unit(baseline=baseline)
    size = {"per_unit": 4, "running_mean": 1, "none": 0}[baseline]
    assert unit.estimator.numerator.shape == (size,)
    file = io.BytesIO()
    torch.save(unit.state_dict(), file)
    file.seek(0)
    fresh = torch.nn.Sequential(StochasticUnit(ScoreFunction(baseline=baseline)))
    state = {"0." + key: value for key, value in torch.load(file).items()}
    fresh.load_state_dict(state, strict=True, assign=assign)
    for key, value in fresh[0].state_dict().items():
        assert torch.equal(value, unit.state_dict()[key]), key
    logits = torch.randn(3, 4, requires_grad=True)
    noise, grads = torch.rand(3, 4), []
    for module in (unit, fresh[0]):
        with Tape() as tape:
            module(logits, noise=noise)
        grads += torch.autograd.grad(tape.surrogate(torch.ones(3)).sum(), logits)
    assert torch.equal(*grads)


def test_loading_an_unused_state_resets_a_used_unit():
    unit = used_score_unit()
    unit.load_state_dict(StochasticUnit("score_function").state_dict(), strict=True)
    assert unit.estimator.numerator.numel() == unit.estimator.denominator.numel() == 0


def test_loaded_state_is_a_copy():
    unit = used_score_unit()
    fresh = StochasticUnit("score_function")
    fresh.load_state_dict(unit.state_dict())
    fresh.estimator.numerator.zero_()
    assert unit.estimator.numerator.any()


def test_missing_and_unexpected_keys_are_still_seen():
    fresh = StochasticUnit("score_function")
    state = used_score_unit().state_dict()
    del state["estimator.numerator"]
    with pytest.raises(RuntimeError, match=r"Missing key.*estimator\.numerator"):
        fresh.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*estimator\.numerator"):
        StochasticUnit("straight_through").load_state_dict(used_score_unit().state_dict())


@every
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda unit: pickle.loads(pickle.dumps(unit))])
def test_deepcopy_and_pickle(name, clone):
    unit = StochasticUnit(name, threshold=0.3, target_rate=0.2)
    twin = clone(unit)
    assert twin.threshold == unit.threshold
    assert twin.target_rate == 0.2
    assert repr(twin) == repr(unit)
    logits = torch.randn(3, 4)
    noise = draw(unit, logits)
    assert torch.equal(twin(logits, noise=noise), unit(logits, noise=noise))
    twin.threshold.fill_(9.0)
    assert unit.threshold != 9.0


def test_copies_do_not_share_their_baseline():
    unit = used_score_unit()
    twin = copy.deepcopy(unit)
    before = unit.estimator.numerator.clone()
    with Tape() as tape:
        twin(torch.zeros(2, 4, requires_grad=True))
    tape.surrogate(torch.full((2,), 5.0))
    assert torch.equal(unit.estimator.numerator, before)
    assert not torch.equal(twin.estimator.numerator, before)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gates_have_the_logits_dtype(name, dtype):
    unit = StochasticUnit(name).to(dtype)
    assert unit.threshold.dtype == dtype
    logits = torch.tensor([[-2.0, -1.0, 1.0, 2.0]], dtype=dtype)
    assert unit(logits).dtype == dtype
    gates = unit.eval()(logits)
    assert gates.dtype == dtype
    assert (gates != 0).tolist() == (StochasticUnit(name).eval()(logits.float()) != 0).tolist()


def test_bfloat16_units_fire_at_their_probability():
    unit, n = StochasticUnit("straight_through").to(torch.bfloat16), 200_000
    logits = torch.full((n,), -2.2, dtype=torch.bfloat16)
    p = logits[0].double().sigmoid().item()
    share = unit(logits).float().mean().item()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_repr():
    assert "threshold (logit): 0" in repr(StochasticUnit("straight_through"))
    shown = repr(StochasticUnit("straight_through", threshold=None, target_rate=0.1))
    assert "target_rate=0.1" in shown
    assert "not calibrated" in shown
    with torch.device("meta"):
        assert "meta" in repr(StochasticUnit("straight_through"))


@pytest.mark.parametrize("name", [name for name, kind in MODULES.items() if kind.needs == "path"])
def test_vmap_over_a_unit(name):
    unit, logits = StochasticUnit(name), torch.randn(3, 5)
    noise = draw(unit, logits)
    mapped = torch.func.vmap(lambda a, z: unit(a, noise=z))(logits, noise)
    assert torch.equal(mapped, unit(logits, noise=noise))


# ---------------------------------------------------------------- bad arguments


def test_unknown_estimator_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown estimator 'straigth_trough'; did you mean 'straight_through'"):
        StochasticUnit("straigth_trough")
    with pytest.raises(ValueError, match=r"unknown estimator 'zzz' \(known: .*score_function"):
        StochasticUnit("zzz")


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (SmoothTimesStochastic, r"SmoothTimesStochastic \(a class: call it\)"),
        (None, "not NoneType"),
        (torch.nn.ReLU(), "not ReLU"),
        (3, "not int"),
    ],
)
def test_what_is_no_estimator(bad, says):
    with pytest.raises(TypeError, match="estimator must be a name .* or an instance.*" + says):
        StochasticUnit(bad)


def test_estimators_that_evaluate_the_objective_are_no_units():
    class Twice(Estimator):
        needs = "objective"

    with pytest.raises(ValueError, match=r"estimator: Twice evaluates the objective.*gatelet\.surrogate"):
        StochasticUnit(Twice())


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("argument", ["threshold", "target_rate"])
def test_rates_outside_the_unit_interval(argument, bad):
    with pytest.raises(ValueError, match=f"{argument} must lie strictly between 0 and 1"):
        StochasticUnit("straight_through", **{argument: bad})


@pytest.mark.usefixtures("as_user")
@every
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (torch.tensor([[0.0, math.nan]]), ValueError, r"logits holds 1 values that are NaN or infinite \(of 2\)"),
        (torch.tensor([[math.inf, -math.inf]]), ValueError, "logits holds 2 values"),
        (torch.tensor([[math.inf, 0.0]], dtype=torch.bfloat16), ValueError, "logits holds 1 values"),
        (torch.tensor([[1, 2]]), TypeError, r"logits must have a floating dtype, not torch\.int64"),
        (torch.tensor([[True]]), TypeError, "logits must have a floating dtype"),
        (torch.tensor([[1j]]), TypeError, "logits must have a floating dtype"),
        (torch.tensor(1.0), ValueError, "logits must have at least one dimension"),
        ([0.0, 1.0], TypeError, r"logits must be a torch\.Tensor, not list"),
    ],
)
def test_bad_logits(name, training, bad, error, says):
    with pytest.raises(error, match=says):
        StochasticUnit(name).train(training)(bad)


def test_huge_finite_logits_are_fine():
    big = torch.full((4,), torch.finfo(torch.float32).max)  # their sum overflows
    assert torch.equal(StochasticUnit("straight_through")(big), torch.ones(4))


@pytest.mark.usefixtures("as_user")
@every
@pytest.mark.parametrize("bad", [torch.rand(3), torch.rand(4, 3), torch.rand(2, 4), torch.rand(1, 3), 0.5])
def test_noise_of_another_shape(name, bad):
    with pytest.raises(ValueError, match=r"noise must be a tensor of shape \(2, 3(, \d+)?\), not"):
        StochasticUnit(name)(torch.zeros(2, 3), noise=bad)


def test_a_unit_that_needs_the_loss_needs_a_tape():
    unit, logits = StochasticUnit("score_function"), torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"ScoreFunction learns from the loss and found no tape.*Tape\(\)"):
        unit(logits)
    with pytest.raises(RuntimeError, match="found no tape"), sampling(unit):
        unit.eval()(logits)
    unit.train()
    with torch.no_grad():
        unit(logits)
    with torch.inference_mode():
        unit(logits.detach())
    unit(logits.detach())  # nothing to train below
    unit.eval()(logits)
    with Tape():
        unit.train()(logits)


def test_public_names():
    assert gatelet.StochasticUnit is StochasticUnit
    assert gatelet.sampling is sampling
