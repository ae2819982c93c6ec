"""Subsets, coupled replicas, random flips, perturb-and-MAP, classes: certified where the contract cannot walk them."""

import itertools

import pytest
import test_contract as contract
import torch

import gatelet
import oracles
import oracles_relaxations
import oracles_second as second
from gatelet.diagnose import moments
from gatelet.estimators import (
    AIMLE,
    ALL,
    ARM,
    ARMS,
    ARSM,
    CARMS,
    DARN,
    IMLE,
    RODEO,
    SIMPLE,
    ZGR,
    BitFlip,
    Concrete,
    DecoupledStraightThrough,
    DisARM,
    DoubleControlVariates,
    LeaveOneOut,
    ReinMax,
    ScoreFunction,
    ShrunkBaseline,
    StraightThrough,
    StraightThroughGumbel,
)

logits_for = contract.logits_for


def close(found, truth, tolerance=1e-10):
    torch.testing.assert_close(found, truth, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- exactly k of N

SHAPES = [(1, 2, 1), (2, 4, 2), (2, 5, 3), (1, 3, 3)]
UNBIASED = ["score_function", "leave_one_out", "enumeration"]


@pytest.mark.parametrize(("batch", "units", "k"), SHAPES)
@pytest.mark.parametrize("name", UNBIASED)
def test_subset_unbiased(name, batch, units, k):
    if name == "leave_one_out" and units == 5:
        return  # 10² outcomes are enough at the other sizes
    check_subset(lambda: ALL[name](kind="subset", k=k), batch, units, k)


def check_subset(make, batch, units, k):
    logits, loss = logits_for(batch, units), oracles.table(batch, units)
    found = moments(loss, logits, make())
    close(found.mean, second.subset_gradient(loss, logits, k))
    gates, mass = second.subset_law(logits, k)
    close(found.value, (mass * loss(gates)).sum(0))
    close(gatelet.exact_gradient(loss, logits, "subset", k), second.subset_gradient(loss, logits, k))


@pytest.mark.parametrize(("batch", "units", "k"), SHAPES)
def test_subset_straight_through_and_simple(batch, units, k):
    check_simple(lambda: SIMPLE(k), batch, units, k)
    logits, loss = logits_for(batch, units), oracles.network(batch, units)
    plain, through = second.subset_mean_slope(loss, logits, k)
    close(moments(loss, logits, StraightThrough(kind="subset", k=k)).mean, plain)
    close(moments(loss, logits, StraightThrough("sigmoid", kind="subset", k=k)).mean, through)
    hard = StraightThrough(unit="hard", kind="subset", k=k)
    assert torch.equal(hard(logits, torch.zeros_like(logits)).detach().sum(-1), torch.full((batch,), float(k)).double())


def check_simple(make, batch, units, k):
    logits, loss = logits_for(batch, units), oracles.network(batch, units)
    close(moments(loss, logits, make()).mean, second.subset_mean_slope(loss, logits, k)[1])


def test_subset_shrunk_baseline_of_one_example():
    logits, loss = logits_for(1, 4), oracles.table(1, 4)
    close(moments(loss, logits, ShrunkBaseline(kind="subset", k=2)).mean, second.subset_gradient(loss, logits, 2))


@pytest.mark.parametrize("make", [Concrete, StraightThroughGumbel])
def test_one_of_two_is_the_bernoulli_unit_at_the_difference(make):
    """Its form for Bernoulli units is certified; perturbed by two Gumbel numbers, whose difference is logistic."""
    logits, noise = logits_for(6, 2), contract.logits_for(6, 2) * 0.7 - 0.3
    one, other = make(0.7, kind="subset", k=1), make(0.7)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    gates = one(a, noise)
    same = other(b[:, :1] - b[:, 1:], noise[:, :1] - noise[:, 1:])
    close(gates[:, :1], same)
    weight = torch.linspace(-1, 2, 6, dtype=torch.float64)[:, None]
    (first,) = torch.autograd.grad((gates[:, :1] * weight).sum(), a)
    (again,) = torch.autograd.grad((same * weight).sum(), b)
    close(first, again)


@pytest.mark.parametrize("make", [IMLE, AIMLE])
def test_implicit_mle_of_one_of_two_is_that_of_the_difference(make):
    logits, noise = logits_for(40, 2), 1.3 * logits_for(40, 2).roll(7, 0)
    slope = logits_for(40, 2).roll(3, 0)
    step = {"step": 0.8} if make is IMLE else {}
    found = make(**step, kind="subset", k=1).difference(logits, noise, slope)
    size = 0.8 if make is IMLE else logits.norm(dim=-1, keepdim=True) / slope.norm(dim=-1, keepdim=True)
    z = (logits + noise)[:, :1] - (logits + noise)[:, 1:]
    shift = size * (slope[:, :1] - slope[:, 1:])
    if make is IMLE:
        expected = ((z > 0).double() - (z - shift > 0).double()) / size
    else:
        expected = ((z + shift > 0).double() - (z - shift > 0).double()) / (2 * size)
    close(found, torch.cat([expected, -expected], -1))
    assert found.any()


def test_relaxed_top_k_is_k_softmaxes_each_without_what_was_taken():
    z, tau = logits_for(3, 5), 0.6
    found = Concrete(tau, kind="subset", k=3)(torch.zeros_like(z), z)
    alpha, total = z / tau, torch.zeros_like(z)
    for _ in range(3):
        p = alpha.softmax(-1)
        total = total + p
        alpha = alpha + torch.log(1 - p) / tau
    close(found, total)
    close(found.sum(-1), torch.full((3,), 3.0).double())


@pytest.mark.parametrize("name", [name for name in ALL if "subset" in ALL[name].kinds and name != "enumeration"])
def test_a_layer_keeps_its_budget_for_every_example(name):
    method = ALL[name](kind="subset", k=3) if name != "simple" else SIMPLE(3)
    layer = gatelet.nn.ConditionalLinear(10, 20, bottleneck=4, estimator=method, target_rate=0.1)
    x = torch.randn(8, 10)
    with gatelet.Tape() as tape:
        loss = layer(tape.replicate(x, method.replicas)).square().sum(-1)
    (tape.surrogate(loss).mean() + gatelet.sparsity.penalty(layer)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.gater.parameters())
    assert len(layer.sparsity) == 0
    if method.binary:
        gates = layer.unit(torch.randn(50, 20))
        assert torch.equal(gates.sum(-1), torch.full((50,), 3.0))
    assert torch.equal((layer.unit.eval()(torch.randn(50, 20)) != 0).sum(-1), torch.full((50,), 3))
    assert gatelet.sparsity.calibrate_thresholds(layer, [x]) == {}


@pytest.mark.parametrize("make", [SIMPLE, lambda k: StraightThrough(kind="subset", k=k)])
def test_a_two_stage_gater_leaves_out_no_unit_of_a_subset(make):
    """Which k open is a matter of all logits, not of those above a threshold."""
    torch.manual_seed(0)
    layer = gatelet.nn.ConditionalLinear(40, 64, bottleneck=8, estimator=make(40), gater="two_stage").eval()
    x = torch.randn(50, 40)
    with torch.no_grad():
        found = layer(x)
        gates = layer.unit(layer.gater(x))
        close(found, gates * layer.expert(x), 1e-5)


def test_subset_refusals():
    with pytest.raises(ValueError, match="k: subset units need it"):
        ScoreFunction(kind="subset")
    with pytest.raises(ValueError, match="k: is for kind='subset'"):
        ScoreFunction(k=3)
    with pytest.raises(ValueError, match="k = 4 gates shall be open, but there are 3"):
        SIMPLE(4)(torch.zeros(2, 3), torch.rand(2, 3))
    with pytest.raises(ValueError, match="has no subset form"):
        DARN(kind=SIMPLE(2).form)


def test_subset_of_many_units_in_single_precision():
    """Marginals of 1,000 units sum to k, and gates have k ones, where the polynomials span hundreds of orders."""
    logits = 8 * torch.randn(3, 1000)
    unit = SIMPLE(50)
    close(unit.probability(logits).sum(-1), torch.full((3,), 50.0), 1e-2)
    assert torch.equal(unit(logits, torch.rand(3, 1000)).sum(-1), torch.full((3,), 50.0))


def test_diagnose_has_rows_for_subsets():
    report = gatelet.diagnose(oracles.table(1, 4), logits_for(1, 4), samples=40, kind="subset", k=2)
    assert {"simple", "imle", "leave_one_out"} <= {row.name for row in report.rows}
    assert report["leave_one_out"].bias < 1e-10


# ---------------------------------------------------------------- coupled replicas


def check_arms(make, samples, units):
    """Over all patterns of K·N gates, with the mass of each from the copula."""
    logits, loss = logits_for(1, units), oracles.table(1, units)
    each = [second.arms_patterns(p, samples) for p in logits.sigmoid()[0].tolist()]
    mean, total = torch.zeros_like(logits), 0.0
    for choice in itertools.product(*each):
        gates = torch.stack([gate for gate, _ in choice], -1).unsqueeze(1)  # (K, 1, N)
        mass = torch.tensor([m for _, m in choice], dtype=torch.float64).prod()
        estimate = make().coefficients(logits.expand(samples, 1, units), gates, loss(gates))
        mean, total = mean + mass * estimate.mean(0), total + mass
    close(total, torch.ones((), dtype=torch.float64))
    close(mean, oracles.bernoulli_gradient(loss, logits))


@pytest.mark.parametrize(("samples", "units"), [(2, 1), (2, 3), (3, 2), (4, 2), (5, 1)])
def test_arms_is_unbiased(samples, units):
    check_arms(ARMS, samples, units)


def test_arms_of_two_is_disarm():
    logits, loss = logits_for(3, 4).expand(2, 3, 4), torch.tensor([[1.0, 2, 3], [2, 5, 1]]).double()
    gates = DisARM()(logits, torch.rand(1, 3, 4, dtype=torch.float64))
    ours, theirs = (method.coefficients(logits, gates, loss).mean(0) for method in (ARMS(), DisARM()))
    close(ours, theirs, 1e-12)


def test_the_copula_has_the_law_that_the_certificate_sums_over():
    """Frequencies of the patterns of three gates over a fine grid of the Dirichlet's simplex (its uniform law)."""
    logits = torch.tensor([-1.2, -0.2, 0.9], dtype=torch.float64)
    ticks = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    first, other = torch.cartesian_prod(ticks, ticks).unbind(-1)
    # The uniform law on the simplex: d_1 = 1 − √(1 − u), d_2 = (1 − d_1)·v.
    d1 = 1 - (1 - first).sqrt()
    d2 = (1 - d1) * other
    shares = torch.stack([d1, d2, 1 - d1 - d2]).clamp_min(1e-300)
    noise = torch.exp(-shares)  # exponentials are the shares themselves, up to their sum
    gates = ARMS()(logits.expand(3, len(d1), 3), noise.unsqueeze(-1).expand(3, len(d1), 3))
    for unit, p in enumerate(logits.sigmoid().tolist()):
        for pattern, mass in second.arms_patterns(p, 3):
            share = (gates[..., unit] == pattern[:, None]).all(0).double().mean().item()
            assert share == pytest.approx(mass, abs=4e-3)


def check_shrunk(make, batch=3):
    """All gates of all examples together, one unit each: the baseline of one holds the losses of the others."""
    logits, loss, samples = logits_for(batch, 1), oracles.table(batch, 1), 2
    p, mean = logits.sigmoid(), torch.zeros_like(logits)
    for outcome in itertools.product((0.0, 1.0), repeat=samples * batch):
        gates = torch.tensor(outcome, dtype=torch.float64).reshape(samples, batch, 1)
        mass = torch.where(gates > 0, p, 1 - p).prod()
        mean = mean + mass * make().coefficients(logits.expand_as(gates), gates, loss(gates)).mean(0)
    close(mean, oracles.bernoulli_gradient(loss, logits))


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_shrunk_baseline_is_unbiased_over_the_batch(batch):
    check_shrunk(ShrunkBaseline, batch)


def test_shrunk_baseline_has_less_variance_where_examples_are_alike():
    torch.manual_seed(0)
    logits = torch.zeros(2, 40, 3, dtype=torch.float64)

    def spread(method):
        estimates = []
        for _ in range(200):
            gates = method(logits, torch.rand(2, 40, 3, dtype=torch.float64))
            losses = 5 + torch.randn(2, 40, dtype=torch.float64)
            estimates.append(method.coefficients(logits, gates, losses).mean(0))
        return torch.stack(estimates).var(0).mean().item()

    assert spread(ShrunkBaseline()) < 0.75 * spread(LeaveOneOut())


# ---------------------------------------------------------------- one flip, and perturb-and-MAP


def check_bit_flip(make, batch, units):
    """Mean over the unit that flips, each with the sample enumerated."""
    logits, loss = logits_for(batch, units), oracles.table(batch, units)
    p, mean = logits.sigmoid(), torch.zeros_like(logits)
    for outcome in itertools.product((True, False), repeat=units):
        fires = torch.tensor(outcome).expand_as(logits)
        mass = torch.where(fires, p, 1 - p).prod(-1, keepdim=True)
        for unit in range(units):
            which = torch.zeros_like(logits)
            which[:, unit] = 1.0
            noise = torch.stack([torch.where(fires, p / 2, (1 + p) / 2), which], -1)[None]
            mean = mean + mass * contract.gradient(make(), loss, logits, noise) / units
    close(mean, oracles.bernoulli_gradient(loss, logits))


@pytest.mark.parametrize(("batch", "units"), [(1, 1), (3, 2), (1, 4)])
def test_bit_flip_is_unbiased(batch, units):
    check_bit_flip(BitFlip, batch, units)


def check_implicit(make, units):
    """Cells of the logistic noise between all places where a gate jumps, for every sign pattern of the gates."""
    logits, loss = logits_for(1, units), oracles.network(1, units)
    truth = oracles.truth("imle" if isinstance(make(), IMLE) and not isinstance(make(), AIMLE) else "aimle", make())
    mean = torch.zeros_like(logits)
    for outcome in itertools.product((True, False), repeat=units):
        fires = torch.tensor(outcome).expand_as(logits)
        slope = oracles.slope_at(loss, fires.double()[None])[0]
        method = make()
        size = logits.norm() / slope.norm() if isinstance(method, AIMLE) else method.step
        edges = torch.stack([-logits, -logits + size * slope, -logits - size * slope])[:, 0]  # (3, N)
        ends = torch.full((1, units), 39.0, dtype=torch.float64)
        cuts = torch.cat([-ends, edges.sort(0).values, ends])
        mass = oracles.logistic_cumulative(cuts[1:]) - oracles.logistic_cumulative(cuts[:-1])
        middle = (cuts[1:] + cuts[:-1]) / 2
        for cell in itertools.product(range(4), repeat=units):
            at = torch.stack([middle[c, i] for i, c in enumerate(cell)])[None]
            if not torch.equal(logits + at > 0, fires):
                continue
            weight = torch.stack([mass[c, i] for i, c in enumerate(cell)]).prod()
            mean = mean + weight * contract.gradient(make(), loss, logits, at[None])
    close(mean, truth(loss, logits, make()))


@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("make", [IMLE, lambda: IMLE(0.3), AIMLE])
def test_implicit_mle_has_its_closed_form(make, units):
    check_implicit(make, units)


def test_implicit_mle_and_the_scale_of_the_loss():
    """s·L with the step λ is s times L with the step s·λ; AIMLE's step is relative to the slope's length."""
    logits, noise, slope = logits_for(40, 3), 1.3 * logits_for(40, 3).roll(7, 0), logits_for(40, 3).roll(3, 0)
    scaled = IMLE(2.0).difference(logits, noise, 0.25 * slope)
    assert scaled.any()
    close(scaled, 0.25 * IMLE(0.5).difference(logits, noise, slope))
    close(AIMLE().difference(logits, noise, 0.25 * slope), 0.25 * AIMLE().difference(logits, noise, slope))


def test_aimle_adapts_its_step():
    unit, a = AIMLE(beta=1.0, rate=0.1), torch.randn(64, 5)
    for _ in range(30):  # every gate changes: the step shrinks
        leaf = a.clone().requires_grad_()
        (unit(leaf, unit.draw_noise(leaf)) * 3.0).sum().backward()
    assert unit.scale < 1.0
    assert unit.state_dict()["scale"] == unit.scale


# ---------------------------------------------------------------- classes


CLASSES = [
    (DARN, lambda p, a, h: second.darn_jacobian(p, h), 1.0),
    (ZGR, lambda p, a, h: second.zgr_jacobian(p, h), 1.0),
    (
        lambda kind: DecoupledStraightThrough(0.5, 1.5, kind),
        lambda p, a, h: second.tempered_jacobian(a, 1.5),
        0.5,
    ),
]


@pytest.mark.parametrize(("make", "jacobian", "temperature"), CLASSES, ids=["darn", "zgr", "decoupled"])
@pytest.mark.parametrize(("batch", "units", "classes"), [(1, 1, 2), (2, 1, 4), (2, 2, 3)])
def test_classes_have_their_closed_form(make, jacobian, temperature, batch, units, classes):
    logits = logits_for(batch * units, classes).reshape(batch, units, classes)
    weight = logits_for(units, classes) - 0.3

    def loss(h):
        return ((h * weight).sum((-1, -2)) - 0.4).tanh().square()

    law = logits / temperature
    truth = oracles_relaxations.categorical_with_jacobians(
        loss, law, lambda h: jacobian(law.softmax(-1), logits, h).expand(batch, units, classes, classes)
    )
    found = moments(loss, logits / 1.0, make(kind="categorical"))
    if temperature == 1:
        close(found.mean, truth)
        return
    # The noise nodes are those of softmax(a); those of softmax(a/τ) are summed here.
    mean = torch.zeros_like(logits)
    for outcome in oracles_relaxations.outcomes_of(units, classes):
        h = outcome.expand_as(logits)
        mass = (law.softmax(-1) * h).sum(-1).prod(-1)[:, None, None]
        mean = mean + mass * contract.gradient(make(kind="categorical"), loss, logits, (60 * h - law)[None])
    close(mean, truth)


def test_zgr_is_exact_for_quadratic_losses_of_classes_and_the_same_as_reinmax():
    logits = logits_for(2, 4).reshape(2, 1, 4)
    pairs = logits_for(4, 4)

    def quadratic(h):
        return torch.einsum("kbvi,ij,kbvj->kb", h, pairs, h)

    close(
        moments(quadratic, logits, ZGR(kind="categorical")).mean,
        oracles_relaxations.categorical_gradient(quadratic, logits),
    )
    a, noise = logits_for(3, 4), torch.rand(1, 3, 4, dtype=torch.float64)
    loss = oracles.network(3, 4)
    close(contract.gradient(ZGR(), loss, a, noise), contract.gradient(ReinMax(), loss, a, noise), 1e-14)
    noise = ZGR(kind="categorical").draw_noise(logits[None], torch.Generator().manual_seed(1))
    classes = [contract.gradient(make(kind="categorical"), quadratic, logits, noise) for make in (ZGR, ReinMax)]
    close(*classes, 1e-14)


def test_shrunk_baseline_of_classes_is_unbiased():
    logits, weight = logits_for(1, 3).reshape(1, 1, 3), torch.tensor([1.0, -2.0, 0.5]).double()

    def loss(h):
        return (h * weight).sum((-1, -2)).square()

    close(
        moments(loss, logits, ShrunkBaseline(kind="categorical")).mean,
        oracles_relaxations.categorical_gradient(loss, logits),
    )


def test_double_control_variates_have_no_variance_for_a_linear_loss():
    logits = logits_for(1, 2)
    assert moments(oracles.linear(1, 2), logits, "double_control_variates").variance.max() < 1e-25
    assert moments(oracles.linear(1, 2), logits, "leave_one_out").variance.max() > 1e-3


def trained_rodeo(cls):
    """With a network that says something."""
    method = cls()
    with torch.no_grad():
        method.out.copy_(torch.randn(2, 10, generator=torch.Generator().manual_seed(3)))
    return method.double()


def check_rodeo(make, units=2):
    logits, loss = logits_for(1, units), oracles.table(1, units)
    close(moments(loss, logits, make()).mean, oracles.bernoulli_gradient(loss, logits))


@pytest.mark.parametrize("units", [1, 2, 3])
def test_rodeo_is_unbiased_whatever_its_network_says(units):
    check_rodeo(lambda: trained_rodeo(RODEO), units)


def test_rodeo_begins_as_leave_one_out_and_learns_to_vary_less():
    logits, loss = logits_for(1, 2), oracles.quadratic(1, 2)
    method = RODEO().double()
    before = moments(loss, logits, method).variance.sum()
    close(before, moments(loss, logits, "leave_one_out").variance.sum(), 1e-12)
    step = torch.optim.Adam(method.parameters(), 0.02)
    many = logits.expand(200, 2)
    wide_loss = lambda h: loss(h.reshape(-1, 1, 2)).reshape(h.shape[:-1])  # noqa: E731
    for seed in range(150):
        step.zero_grad()
        noise = method.draw_noise(many.expand(2, 200, 2), torch.Generator().manual_seed(seed))
        method.surrogate(wide_loss, many, noise).mean().backward()
        step.step()
    assert moments(loss, logits, method).variance.sum() < 0.8 * before


def class_loss(variables, classes):
    """A loss with an entry for every outcome of the variables, of gates (K, B, V, C)."""
    entries = logits_for(classes**variables, 1)[:, 0]
    places = classes ** torch.arange(variables)
    return lambda h: entries[(h.argmax(-1) * places).sum(-1)]


def check_carms(make, samples, variables, classes):
    """Over all patterns of K·V classes, each an example of one batch, with its mass under the copula."""
    logits, loss = logits_for(variables, classes)[None], class_loss(variables, classes)
    each = [second.carms_patterns(p, samples) for p in logits.softmax(-1)[0].tolist()]
    choices = list(itertools.product(*each))
    gates = torch.stack([torch.stack([gate for gate, _ in choice], 1) for choice in choices], 1)  # (K, Q, V, C)
    mass = torch.tensor([[m for _, m in choice] for choice in choices], dtype=torch.float64).prod(-1)
    losses = loss(gates).unsqueeze(-1).expand(gates.shape[:-1])
    estimate = make().coefficients(logits.expand_as(gates), gates, losses).mean(0)
    close(mass.sum(), torch.ones((), dtype=torch.float64))
    close(torch.einsum("q,qvc->vc", mass, estimate)[None], oracles_relaxations.categorical_gradient(loss, logits))


@pytest.mark.parametrize(
    ("samples", "variables", "classes"), [(2, 1, 2), (2, 1, 5), (2, 2, 3), (3, 1, 4), (3, 2, 3), (4, 1, 3), (5, 1, 2)]
)
def test_carms_is_unbiased(samples, variables, classes):
    check_carms(CARMS, samples, variables, classes)


def test_carms_of_two_classes_and_two_samples_is_disarm():
    logits, loss = logits_for(3, 2).reshape(3, 1, 2).expand(2, 3, 1, 2), torch.tensor([[1.0, 2, 3], [2, 5, 1]]).double()
    gates = CARMS()(logits, CARMS().draw_noise(logits, torch.Generator().manual_seed(1)))
    ours = CARMS().coefficients(logits, gates, loss.unsqueeze(-1)).mean(0)
    theirs = DisARM().coefficients(logits[..., 0] - logits[..., 1], gates[..., 0], loss).mean(0)
    close(ours, torch.stack([theirs, -theirs], -1), 1e-12)


def test_the_copula_of_classes_has_the_law_that_the_certificate_sums_over():
    """Frequencies of the patterns of three samples of four classes over a grid of the Dirichlet and the orders."""
    logits, orders, ticks = logits_for(4, 1)[:, 0], 6, (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    first, other = torch.cartesian_prod(ticks, ticks).unbind(-1)
    d1 = 1 - (1 - first).sqrt()  # the uniform law on the simplex
    d2 = (1 - d1) * other
    shares = torch.stack([d1, d2, 1 - d1 - d2]).clamp_min(1e-300)
    noise = (-shares.log())[:, None, :, None].expand(3, orders, -1, 4).clone()
    uniform = (torch.arange(orders, dtype=torch.float64) + 0.5) / orders
    noise[0, ..., -1] = -(-uniform.log()).log()[:, None]
    classes = CARMS()(logits.expand(noise.shape), noise).argmax(-1)
    for pattern, mass in second.carms_patterns(logits.softmax(-1).tolist(), 3):
        share = (classes == pattern.argmax(-1)[:, None, None]).all(0).double().mean().item()
        assert share == pytest.approx(mass, abs=4e-3)


def test_carms_stays_finite_where_classes_are_out_of_reach():
    logits = torch.tensor([[100.0, -100.0, 0.0], [0.0, 90.0, 90.0]]).expand(4, 50, 2, 3)
    for dtype in (torch.float32, torch.bfloat16):
        a = logits.to(dtype)
        gates = CARMS()(a, CARMS().draw_noise(a, torch.Generator().manual_seed(0)))
        assert CARMS().coefficients(a, gates, torch.rand(4, 50, 2)).isfinite().all()


def check_arsm(make, variables, classes):
    """Over all cells of all variables' simplices, each an example of one batch: the estimate is linear in between."""
    logits, loss = logits_for(variables, classes)[None], class_loss(variables, classes)
    cells = [second.arsm_cells(a) for a in logits[0]]
    index = torch.cartesian_prod(*[torch.arange(len(mass)) for _, mass in cells]).reshape(-1, variables)
    shares = torch.stack([centre[i] for (centre, _), i in zip(cells, index.T, strict=True)], 1)  # (Q, V, C)
    mass = torch.stack([m[i] for (_, m), i in zip(cells, index.T, strict=True)]).prod(0)
    estimate = contract.gradient(make(), loss, logits.expand_as(shares), -shares.log()[None])
    close(mass.sum(), torch.ones((), dtype=torch.float64))
    close(torch.einsum("q,qvc->vc", mass, estimate)[None], oracles_relaxations.categorical_gradient(loss, logits))


@pytest.mark.parametrize(("variables", "classes"), [(1, 2), (3, 2), (1, 3), (2, 3), (1, 4)])
def test_arsm_is_unbiased(variables, classes):
    check_arsm(ARSM, variables, classes)


def check_arsm_by_draws(make, variables, classes, draws=40_000):
    """Where there are too many cells: the mean of many draws, within five of its standard errors in every logit."""
    logits, loss = logits_for(variables, classes)[None], class_loss(variables, classes)
    many = logits.expand(draws, variables, classes)
    noise = ARSM().draw_noise(many[None], torch.Generator().manual_seed(0))
    estimates = contract.gradient(make(), loss, many, noise)
    error = estimates.std(0) / draws**0.5
    off = estimates.mean(0) - oracles_relaxations.categorical_gradient(loss, logits)[0]
    assert (error > 0).all()
    assert (off.abs() < 5 * error).all()


@pytest.mark.parametrize(("variables", "classes"), [(2, 4), (1, 5), (2, 5)])
def test_arsm_is_unbiased_within_the_error_of_many_draws(variables, classes):
    check_arsm_by_draws(ARSM, variables, classes)


def test_arsm_of_two_classes_is_arm():
    logits, weight = logits_for(5, 6).reshape(5, 3, 2), torch.tensor([1.0, -2.0, 0.7]).double()
    noise = ARSM().draw_noise(logits[None], torch.Generator().manual_seed(2))
    ours = contract.gradient(ARSM(), lambda h: (h[..., 0] @ weight - 0.4).square(), logits, noise)
    share = (-noise).softmax(-1)[..., 0]
    theirs = contract.gradient(ARM(), lambda h: (h @ weight - 0.4).square(), logits[..., 0] - logits[..., 1], share)
    close(ours, torch.stack([theirs, -theirs], -1), 1e-12)


@pytest.mark.parametrize("make", [ARSM, CARMS])
def test_classes_train_in_a_layer_of_any_batch(make):
    for batch, classes in ((0, 3), (4, 1), (4, 3)):
        logits = torch.randn(batch, 2, classes, requires_grad=True)
        losses = gatelet.surrogate(lambda h: h.square().sum((-1, -2)), logits, make(), samples=make().replicas)
        losses.sum().backward()
        assert losses.shape == (batch,)
        assert logits.grad.isfinite().all()


def test_diagnose_recommends_among_the_methods_for_classes():
    """Four samples of classes that are equally probable: those that avoid each other vary less."""
    weight = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64) * torch.tensor([[1.0], [2.0], [3.0]])
    report = gatelet.diagnose(
        lambda h: (h * weight).sum((-1, -2)),
        torch.zeros(1, 3, 3, dtype=torch.float64),
        ["leave_one_out", "carms", "arsm"],
        1500,
        replicas=4,
        kind="categorical",
    )
    assert all(row.unbiased for row in report.rows)
    assert report.recommendation.name == "carms"
    assert [row.evaluations for row in report.rows] == [4, 4, 16]


# ---------------------------------------------------------------- wrong on purpose


class UnweightedCARMS(CARMS):
    """Antithetic classes as if they were independent."""

    def weights(self, p, gates):
        return torch.ones_like(super().weights(p, gates))


class OfItsNeighbour(ARSM):
    """Weighs the swaps of one class by the noise of its neighbour."""

    def estimate(self, objective, logits, gates, losses, noise):
        return super().estimate(objective, logits, gates, losses, noise).roll(1, -1)


class OwnLossInItsControl(RODEO):
    """Extrapolates from the sample itself too."""

    def _estimate(self, logits, gates, losses, slope, values):
        mean = losses.mean(0, keepdim=True).expand_as(losses)
        return super()._estimate(logits, gates, losses + 0.3 * (mean - losses), slope, values)


class UnweightedARMS(ARMS):
    """Antithetic samples without the factor that makes them unbiased."""

    def coefficients(self, logits, gates, losses, noise=None):
        return self.score(logits, gates, losses) * (losses - losses.mean(0)).unsqueeze(-1) * 2


class ForgetsItsExpansion(DoubleControlVariates):
    """Does not add the expansion's gradient again."""

    def estimate(self, objective, logits, gates, losses, noise):
        right = super().estimate(objective, logits, gates, losses, noise)
        slope = torch.func.grad(lambda h: objective(h).sum())(gates)
        p = logits.sigmoid()
        return right - self.alpha * (slope.sum(0) - slope) / (len(slope) - 1) * p * (1 - p)


class NotTimesN(BitFlip):
    """Forgets how seldom a unit is drawn."""

    def estimate(self, objective, logits, gates, losses, noise):
        return super().estimate(objective, logits, gates, losses, noise) / logits.shape[-1]


class ShrinksTowardsAll(ShrunkBaseline):
    """Takes the example's own loss into the baseline."""

    def coefficients(self, logits, gates, losses, noise=None):
        return self.score(logits, gates, losses) * (losses - losses.mean()).unsqueeze(-1)


class OneSigmoid(ScoreFunction):
    """Scores subsets as if their units were independent."""

    def score(self, logits, gates, losses):
        return gates - logits.sigmoid()


class ThroughTheSigmoid(SIMPLE):
    """The sigmoid's slope in place of the marginals'."""

    def forward(self, logits, noise):
        return gatelet.estimators._base.straight_through(self.sample(logits, noise), logits.sigmoid())


class ClimbingIMLE(IMLE):
    """Steps along the gradient instead of against it."""

    def difference(self, logits, noise, slope):
        return super().difference(logits, noise, -slope)


class WholeDARN(ZGR):
    """Forgets to halve."""

    def path(self, a, gates, p):
        return 2 * super().path(a, gates, p)


class OneTemperature(DecoupledStraightThrough):
    """Samples at the backward temperature."""

    def forward(self, logits, noise):
        return DecoupledStraightThrough(self.backward_temperature, self.backward_temperature)(logits, noise)


class UnscaledGates(gatelet.estimators.StochasticGates):
    """Adds noise of unit scale."""

    def forward(self, logits, noise):
        return (logits + noise).clamp(0, 1)


def expectation(name):
    return lambda make: contract.check_expectation(name, make, "network", 1, 2)


WRONG = [
    (UnweightedCARMS, CARMS, lambda make: check_carms(make, 3, 1, 3)),
    (OfItsNeighbour, ARSM, lambda make: check_arsm(make, 1, 3)),
    (OfItsNeighbour, ARSM, lambda make: check_arsm_by_draws(make, 2, 5)),
    (UnweightedARMS, ARMS, lambda make: check_arms(make, 3, 2)),
    (ForgetsItsExpansion, DoubleControlVariates, expectation("double_control_variates")),
    (
        lambda: trained_rodeo(OwnLossInItsControl),
        lambda: trained_rodeo(RODEO),
        check_rodeo,
    ),
    (NotTimesN, BitFlip, lambda make: check_bit_flip(make, 1, 2)),
    (ShrinksTowardsAll, ShrunkBaseline, check_shrunk),
    (
        lambda: OneSigmoid(baseline="none", kind="subset", k=2),
        lambda: ScoreFunction(baseline="none", kind="subset", k=2),
        lambda make: check_subset(make, 1, 4, 2),
    ),
    (lambda: ThroughTheSigmoid(2), lambda: SIMPLE(2), lambda make: check_simple(make, 1, 4, 2)),
    (ClimbingIMLE, IMLE, lambda make: check_implicit(make, 2)),
    (WholeDARN, ZGR, expectation("zgr")),
    (
        OneTemperature,
        DecoupledStraightThrough,
        lambda make: contract.check_fire_probability("decoupled_straight_through", make),
    ),
    (UnscaledGates, gatelet.estimators.StochasticGates, expectation("stochastic_gates")),
]


@pytest.mark.parametrize(("wrong", "right", "check"), WRONG)
def test_wrong_ones_are_rejected(wrong, right, check):
    check(right)
    with pytest.raises(AssertionError):
        check(wrong)
