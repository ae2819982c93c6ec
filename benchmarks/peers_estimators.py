"""Gradient estimators of other libraries on the same problems: bias, variance, time, lines of user code.

    python benchmarks/peers_estimators.py --draws 2000 --json peers.json --markdown peers.md

Optional installs, in an environment of their own (torch first, the peers with --no-deps): docs/peers.md lists them. A
library that is missing or fails is reported as such. Each runs in a process of its own, because storchastic patches
torch at import.

The problems: E[(w·h − t)²] for three gates with logits a, P(h) ∝ exp(a·h): all gates free (Bernoulli units), exactly
one open (classes), exactly two open (a subset). The exact gradient is enumerated here. A case is a function of a that
does all that its user has to write, up to backward(); its lines are counted. A method that draws several samples draws
two. Sparse maps, which draw nothing, are compared with a bisection in float64.
"""

import argparse
import inspect
import json
import math
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import torch

LOGITS = torch.tensor([-1.0, 0.3, 1.2])
WEIGHT, TARGET = torch.tensor([1.0, -0.7, 0.5]), 0.45


def f(h):
    """(..., 3) -> (...)"""
    return ((h * WEIGHT).sum(-1) - TARGET) ** 2


PROBLEMS = {
    "gates": ("Three Bernoulli gates", (0, 1, 2, 3)),
    "classes": ("One variable of three classes", (1,)),
    "subset": ("Exactly two of three gates", (2,)),
}
"""What it is called, and how many gates may be open."""


def exact(problem):
    """Return the gradient by enumeration, in float64."""
    _, counts = PROBLEMS[problem]
    a = LOGITS.double().requires_grad_()
    h = torch.tensor([bits for bits in product((0.0, 1.0), repeat=3) if sum(bits) in counts], dtype=torch.float64)
    losses = (h @ WEIGHT.double() - TARGET) ** 2
    return torch.autograd.grad((h @ a).softmax(0) @ losses, a)[0]


@dataclass(frozen=True)
class Case:
    """One estimator as a library's user calls it."""

    name: str
    unbiased: bool
    """Whether its library declares it unbiased for the problem."""
    call: Callable[[torch.Tensor], None]
    problem: str = "gates"


Cases = list[Case]


def _ours(estimator: str, samples: int, **options: object) -> Case:
    """One of gatelet's estimators, called through ``gatelet.surrogate``."""
    import gatelet

    method = gatelet.estimators.ALL[estimator](**options)
    told = ", ".join(f"{key}={value}" for key, value in options.items() if key not in ("kind", "k"))
    name = f"{estimator}({told})" if told else estimator
    unbiased = method.unbiased and method.binary
    if method.kind == "categorical":  # one variable

        def call(a):
            gatelet.surrogate(lambda h: f(h).squeeze(-1), a.unsqueeze(0), method, samples=samples).backward()

        return Case(name, unbiased, call, "classes")

    def call(a):
        gatelet.surrogate(f, a, method, samples=samples).backward()

    return Case(name, unbiased, call, "gates" if method.kind == "bernoulli" else "subset")


def _gatelet() -> Cases:
    return [*_our_gates(), *_our_classes(), *_our_subsets()]


def _our_gates() -> Cases:
    return [
        _ours("score_function", 1, baseline="none"),
        _ours("score_function", 1, baseline="running_mean"),
        _ours("leave_one_out", 2),
        _ours("double_control_variates", 2),
        _ours("rodeo", 2),
        _ours("arm", 2),
        _ours("disarm", 2),
        _ours("arms", 2),
        _ours("bit_flip", 1),
        _ours("rebar", 1),
        _ours("relax", 1),
        _ours("muprop", 1),
        _ours("local_expectation", 1),
        _ours("enumeration", 1),
        _ours("straight_through", 1, slope="sigmoid"),
        _ours("darn", 1),
        _ours("zgr", 1),
        _ours("reinmax", 1),
        _ours("decoupled_straight_through", 1),
        _ours("imle", 1),
        _ours("aimle", 1),
        _ours("concrete", 1, temperature=0.5),
        _ours("straight_through_gumbel", 1, temperature=0.5),
        _ours("hard_concrete", 1),
        _ours("stochastic_gates", 1),
        _ours("smooth_times_stochastic", 1),
    ]


def _our_classes() -> Cases:
    classes = {"kind": "categorical"}
    return [
        _ours("score_function", 1, baseline="none", **classes),
        _ours("leave_one_out", 2, **classes),
        _ours("unordered_set", 2, **classes),
        _ours("carms", 2, **classes),
        _ours("arsm", 1, **classes),
        _ours("rebar", 1, **classes),
        _ours("relax", 1, **classes),
        _ours("straight_through", 1, slope="sigmoid", **classes),
        _ours("darn", 1, **classes),
        _ours("zgr", 1, **classes),
        _ours("reinmax", 1, **classes),
        _ours("decoupled_straight_through", 1, **classes),
        _ours("concrete", 1, temperature=0.5, **classes),
        _ours("straight_through_gumbel", 1, temperature=0.5, **classes),
    ]


def _our_subsets() -> Cases:
    two = {"kind": "subset", "k": 2}
    return [
        _ours("score_function", 1, baseline="none", **two),
        _ours("leave_one_out", 2, **two),
        _ours("enumeration", 1, **two),
        _ours("simple", 1, k=2),
        _ours("imle", 1, **two),
        _ours("aimle", 1, **two),
        _ours("concrete", 1, temperature=0.5, **two),
        _ours("straight_through_gumbel", 1, temperature=0.5, **two),
    ]


def _torch() -> Cases:
    from torch.distributions import (
        Bernoulli,
        OneHotCategorical,
        OneHotCategoricalStraightThrough,
        RelaxedBernoulli,
        RelaxedOneHotCategorical,
    )

    def score_function(a):
        distribution = Bernoulli(logits=a)
        h = distribution.sample()
        loss = f(h)
        (loss + loss.detach() * distribution.log_prob(h).sum(-1)).backward()

    def relaxed_bernoulli(a):
        h = RelaxedBernoulli(torch.tensor(0.5), logits=a).rsample()
        f(h).backward()

    def score_function_of_classes(a):
        distribution = OneHotCategorical(logits=a)
        h = distribution.sample()
        loss = f(h)
        (loss + loss.detach() * distribution.log_prob(h)).backward()

    def straight_through(a):
        h = OneHotCategoricalStraightThrough(logits=a).rsample()
        f(h).backward()

    def relaxed_classes(a):
        h = RelaxedOneHotCategorical(torch.tensor(0.5), logits=a).rsample()
        f(h).backward()

    return [
        Case("score function, log_prob", True, score_function),
        Case("RelaxedBernoulli(0.5)", False, relaxed_bernoulli),
        Case("score function, log_prob", True, score_function_of_classes, "classes"),
        Case("OneHotCategoricalStraightThrough", False, straight_through, "classes"),
        Case("RelaxedOneHotCategorical(0.5)", False, relaxed_classes, "classes"),
    ]


def _storchastic() -> Cases:
    import storch
    from storch.method import ARM, REBAR, RELAX, DisARM, Expect, GumbelSoftmax, ScoreFunction, UnorderedSetEstimator
    from torch.distributions import Bernoulli, OneHotCategorical

    def case(name: str, unbiased: bool, method: object) -> Case:
        def call(a):
            h = method(Bernoulli(logits=a))
            storch.add_cost(f(h), "loss")
            storch.backward()

        return Case(name, unbiased, call)

    def classes(name: str, unbiased: bool, method: object) -> Case:
        def call(a):
            h = method(OneHotCategorical(logits=a))
            storch.add_cost(f(h), "loss")
            storch.backward()

        return Case(name, unbiased, call, "classes")

    relaxed = {"initial_temperature": 0.5, "min_temperature": 0.5}
    return [
        case("ScoreFunction", True, ScoreFunction("h")),
        case("ScoreFunction, moving_average", True, ScoreFunction("h", baseline_factory="moving_average")),
        case("ScoreFunction, batch_average", True, ScoreFunction("h", n_samples=2, baseline_factory="batch_average")),
        case("ARM", True, ARM("h")),
        case("DisARM", True, DisARM("h")),
        case("REBAR", True, REBAR("h")),
        case("RELAX", True, RELAX("h", in_dim=3)),
        case("Expect", True, Expect("h")),
        case("GumbelSoftmax(0.5)", False, GumbelSoftmax("h", **relaxed)),
        case("GumbelSoftmax(0.5, straight_through)", False, GumbelSoftmax("h", straight_through=True, **relaxed)),
        classes("ScoreFunction", True, ScoreFunction("h")),
        classes(
            "ScoreFunction, batch_average", True, ScoreFunction("h", n_samples=2, baseline_factory="batch_average")
        ),
        classes("Expect", True, Expect("h")),
        classes("GumbelSoftmax(0.5)", False, GumbelSoftmax("h", **relaxed)),
        classes("GumbelSoftmax(0.5, straight_through)", False, GumbelSoftmax("h", straight_through=True, **relaxed)),
        classes("UnorderedSetEstimator", True, UnorderedSetEstimator("h", k=2)),
        # Last, because an error leaves storchastic in a changed state.
        classes("RELAX", True, RELAX("h", in_dim=3)),
        classes("REBAR", True, REBAR("h")),
    ]


def _relaxit() -> Cases:
    from relaxit.distributions import (
        DecoupledStraightThroughGumbelSoftmax,
        GumbelSoftmaxTopK,
        HardConcrete,
        RebarRelaxation,
        StochasticTimesSmooth,
        StraightThroughBernoulli,
    )

    def straight_through(a):
        h = StraightThroughBernoulli(logits=a).rsample()
        f(h).backward()

    def rebar(a):
        h = RebarRelaxation(a.sigmoid(), torch.tensor(0.5)).rsample()
        f(h).backward()

    def hard_concrete(a):
        beta, xi, gamma = torch.tensor(2 / 3), torch.tensor(1.1), torch.tensor(-0.1)
        h = HardConcrete(a.exp(), beta, xi, gamma).rsample()
        f(h).backward()

    def smooth(a):
        h = StochasticTimesSmooth(logits=a).rsample()
        f(h).backward()

    def decoupled(a):
        h = DecoupledStraightThroughGumbelSoftmax(1.0, 2.0, logits=a).rsample()
        f(h).backward()

    def top_two(a):
        h = GumbelSoftmaxTopK(logits=a, K=torch.tensor(2), tau=torch.tensor(0.5)).rsample()
        f(h).backward()

    return [
        Case("StraightThroughBernoulli", False, straight_through),
        Case("RebarRelaxation(0.5)", False, rebar),
        Case("HardConcrete", False, hard_concrete),
        Case("StochasticTimesSmooth", False, smooth),
        Case("DecoupledStraightThroughGumbelSoftmax(1, 2)", False, decoupled, "classes"),
        Case("GumbelSoftmaxTopK(2, 0.5)", False, top_two, "subset"),
    ]


def _reinmax() -> Cases:
    from reinmax import reinmax

    def two_classes(a):
        h, _ = reinmax(torch.stack([a, torch.zeros_like(a)], -1), 1.0)
        f(h[..., 0]).backward()

    def three_classes(a):
        h, _ = reinmax(a.unsqueeze(0), 1.0)
        f(h[0]).backward()

    return [
        Case("reinmax, Bernoulli as two classes", False, two_classes),
        Case("reinmax", False, three_classes, "classes"),
    ]


def _imle() -> Cases:
    from imle.noise import SumOfGammaNoiseDistribution
    from imle.target import TargetDistribution
    from imle.wrapper import imle

    def case(k: int, problem: str) -> Case:
        noise, target = SumOfGammaNoiseDistribution(k), TargetDistribution(1.0, 1.0)

        @imle(target_distribution=target, noise_distribution=noise)
        def largest(logits):
            return torch.zeros_like(logits).scatter(-1, logits.topk(k).indices, 1.0)

        def call(a):
            h = largest(a.unsqueeze(0))
            f(h[0]).backward()

        return Case(f"imle, λ = 1, {k} largest", False, call, problem)

    return [case(1, "classes"), case(2, "subset")]


def _stg() -> Cases:
    from stg.layers import FeatureSelector

    selector = FeatureSelector(3, 0.5, "cpu")

    def call(a):
        selector.mu = torch.nn.Parameter(a.detach() - 0.5)
        h = selector(torch.ones(3))
        f(h).backward()
        a.grad = selector.mu.grad

    return [Case("FeatureSelector", False, call)]


def _pyro() -> Cases:
    import pyro
    import pyro.distributions as dist
    from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

    def trace(a):
        def guide():
            pyro.sample("h", dist.Bernoulli(logits=a).to_event(1))

        def model():
            h = pyro.sample("h", dist.Bernoulli(logits=a.detach()).to_event(1))
            pyro.factor("loss", -f(h))

        Trace_ELBO().differentiable_loss(model, guide).backward()

    def trace_graph(a):  # it differentiates registered parameters only
        def guide():
            pyro.sample("h", dist.Bernoulli(logits=pyro.param("a", a.detach())).to_event(1))

        def model():
            h = pyro.sample("h", dist.Bernoulli(logits=a.detach()).to_event(1))
            pyro.factor("loss", -f(h))

        pyro.clear_param_store()
        TraceGraph_ELBO().loss_and_grads(model, guide)
        a.grad = pyro.param("a").grad

    def straight_through(a):
        h = dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=a).rsample()
        f(h).backward()

    def enumerated(a):
        def guide():
            for i in range(3):
                pyro.sample(f"h{i}", dist.Bernoulli(logits=a[i]), infer={"enumerate": "parallel"})

        def model():
            bits = [pyro.sample(f"h{i}", dist.Bernoulli(logits=a[i].detach())) for i in range(3)]
            h = torch.stack(torch.broadcast_tensors(*bits), -1)
            pyro.factor("loss", -f(h))

        TraceEnum_ELBO(max_plate_nesting=0).differentiable_loss(model, guide).backward()

    def straight_through_classes(a):
        h = dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), logits=a).rsample()
        f(h).backward()

    return [
        Case("Trace_ELBO", True, trace),
        Case("TraceGraph_ELBO", True, trace_graph),
        Case("TraceEnum_ELBO, parallel", True, enumerated),
        Case("RelaxedBernoulliStraightThrough(0.5)", False, straight_through),
        Case("RelaxedOneHotCategoricalStraightThrough(0.5)", False, straight_through_classes, "classes"),
    ]


Map = Callable[[torch.Tensor], torch.Tensor]


def _maps_of_gatelet() -> dict[str, Map]:
    from gatelet.estimators import ALL

    sparsemax, entmax = ALL["sparsemax"](), ALL["entmax"]()
    return {"sparsemax": lambda a: sparsemax(a, a), "entmax": lambda a: entmax(a, a)}  # the noise is ignored


def _maps_of_entmax() -> dict[str, Map]:
    from entmax import entmax15, sparsemax

    return {"sparsemax": lambda a: sparsemax(a, dim=-1), "entmax": lambda a: entmax15(a, dim=-1)}


MAPS: dict[str, tuple[str, Callable[[], dict[str, Map]]]] = {
    "gatelet": ("gatelet", _maps_of_gatelet),
    "entmax": ("entmax", _maps_of_entmax),
}


def bisection(name: str, a: torch.Tensor) -> torch.Tensor:
    """Return the map by bisection for the threshold t, at which the gates sum to 1."""
    open_at = {"sparsemax": lambda t: (a - t).clamp_min(0), "entmax": lambda t: (a / 2 - t).clamp_min(0).square()}[name]
    high = (a if name == "sparsemax" else a / 2).amax(-1, keepdim=True)
    low = high - 1
    for _ in range(80):
        middle = (low + high) / 2
        above = open_at(middle).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return open_at((low + high) / 2)


def measure_maps(library: str) -> list[dict[str, object]]:
    """Return a row per sparse map of one library: its distance from the bisection, time, what takes it."""
    torch.set_num_threads(1)
    package, maps = MAPS[library]
    try:
        listed = maps()
    except Exception as error:
        return [{"library": library, "map": "–", "error": f"{type(error).__name__}: {error}"}]
    draw = torch.Generator().manual_seed(0)
    a = 2 * torch.randn(16, 30, generator=draw, dtype=torch.float64)
    weight, wide = torch.randn(a.shape, generator=draw, dtype=torch.float64), torch.randn(64, 1000, generator=draw)
    rows: list[dict[str, object]] = []
    for name, call in listed.items():
        leaf = a.clone().requires_grad_()
        slope = torch.autograd.grad((call(leaf) * weight).sum(), leaf)[0]
        # Central differences in every logit; the map is piecewise smooth, and the draws are not at a kink.
        moves = 1e-6 * torch.eye(30, dtype=torch.float64)[:, None]
        ends = [(bisection(name, a + sign * moves) * weight).sum(-1) for sign in (1, -1)]
        truth = ((ends[0] - ends[1]) / 2e-6).T
        leaf, times = wide.clone().requires_grad_(), []
        for _ in range(40):
            began = time.perf_counter()
            call(leaf).square().sum().backward()
            times.append(1e3 * (time.perf_counter() - began))
        small = a[:2, :4].clone().requires_grad_()
        rows.append(
            {
                "library": library,
                "version": version_of(package),
                "map": name,
                "value_error": (call(a) - bisection(name, a)).abs().max().item(),
                "gradient_error": (slope - truth).abs().max().item(),
                "milliseconds": torch.tensor(times).median().item(),
                "second derivative": works(lambda call=call, x=small: torch.autograd.gradgradcheck(call, (x,))),
                "torch.func": works(
                    lambda call=call, x=small: torch.func.vmap(torch.func.grad(lambda y: call(y)[0]))(x)
                ),
                "torch.compile, whole graph": works(
                    lambda call=call, x=small: torch.compile(call, fullgraph=True, backend="aot_eager")(x)
                ),
            }
        )
    return rows


def works(call: Callable[[], object]) -> bool:
    """Return whether it runs through."""
    try:
        call()
    except Exception:
        return False
    return True


def version_of(package: str) -> str:
    """Return the version of an installed package, or that it runs from a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "source"


LIBRARIES: dict[str, tuple[str, Callable[[], Cases]]] = {
    "gatelet": ("gatelet", _gatelet),
    "torch.distributions": ("torch", _torch),
    "storchastic": ("storchastic", _storchastic),
    "relaxit": ("relaxit", _relaxit),
    "reinmax": ("reinmax", _reinmax),
    "pyro": ("pyro-ppl", _pyro),
    "torch-imle": ("torch-imle", _imle),
    "stg": ("stg", _stg),
}


def measure(library: str, draws: int) -> list[dict[str, object]]:
    """Return a row per case of one library."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    package, cases = LIBRARIES[library]
    found = version_of(package)
    try:
        listed = cases()
    except Exception as error:
        return [{"library": library, "version": found, "error": f"{type(error).__name__}: {error}"}]
    rows: list[dict[str, object]] = []
    for case in listed:
        row: dict[str, object] = {"library": library, "version": found, "problem": case.problem, "case": case.name}
        row |= {"unbiased": case.unbiased, "lines": lines(case.call)}
        reference = exact(case.problem)
        try:
            gradients, milliseconds = sample(case.call, draws)
        except Exception as error:  # a peer that fails is a result
            rows.append({**row, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"})
            continue
        finite = bool(gradients.isfinite().all())
        mean, variance = gradients.mean(0), gradients.var(0)
        # A mean whose every draw is the same has rounding for a standard error.
        errors = (mean - reference).abs() / (variance / draws).sqrt().clamp_min(1e-7)
        rows.append(
            {
                **row,
                "finite": finite,
                "bias_in_standard_errors": errors.max().item() if finite else None,
                "relative_bias": ((mean - reference).norm() / reference.norm()).item() if finite else None,
                "mean": mean.tolist() if finite else None,
                "variance": variance.mean().item() if finite else None,
                "milliseconds": milliseconds,
            }
        )
    return rows


def sample(call: Callable[[torch.Tensor], None], draws: int) -> tuple[torch.Tensor, float]:
    """Return this many gradients, and the median milliseconds of one."""
    torch.manual_seed(0)
    gradients, times = torch.empty(draws, 3, dtype=torch.float64), []
    for i in range(-20, draws):
        a = LOGITS.clone().requires_grad_()
        began = time.perf_counter()
        call(a)
        times.append(1e3 * (time.perf_counter() - began))
        if i >= 0:
            gradients[i] = math.nan if a.grad is None else a.grad.detach()
    return gradients, torch.tensor(times).median().item()


def lines(call: Callable[[torch.Tensor], None]) -> int:
    """Count the lines of a case, without its def, blank lines and comments; the imports are not counted either."""
    source = [line.strip() for line in inspect.getsource(call).splitlines()[1:]]
    return sum(bool(line) and not line.startswith("#") for line in source)


def markdown(rows: list[dict[str, object]], draws: int) -> str:
    """Return a table per problem, and that of the maps."""
    where = f"{date.today()}, {draws} draws, seed 0, torch {torch.__version__}, {platform.system()}, one thread"
    text = f"{where}.\n"
    for problem, (title, _) in PROBLEMS.items():
        told = ", ".join(f"{value:.4f}" for value in exact(problem).tolist())
        some = [row for row in rows if row.get("problem") == problem]
        text += f"\n## {title}\n\nExact gradient: ({told}).\n\n{table(some)}"
    text += f"\n## Sparse maps\n\n{table_of_maps([row for row in rows if 'map' in row])}"
    for row in rows:
        if "problem" not in row and "map" not in row:
            text += f"\n{row['library']} {row['version']} does not run: {row['error']}\n"
    return text


def table(rows: list[dict[str, object]]) -> str:
    """Return the table of one problem."""
    head = ["library", "case", "claims unbiased", "bias (standard errors)", "relative bias", "variance", "ms", "lines"]
    body = []
    for row in rows:
        told = [f"{row['library']} {row['version']}", str(row["case"])]
        if "error" in row:
            body.append([*told, "does not run: " + str(row["error"]).replace("|", "/"), *[""] * 5])
            continue
        told += ["yes" if row["unbiased"] else "no"]
        if not row["finite"]:
            body.append([*told, "not finite", "", "", f"{row['milliseconds']:.2f}", str(row["lines"])])
            continue
        told += [f"{row['bias_in_standard_errors']:.1f}", f"{row['relative_bias']:.3f}", f"{row['variance']:.4f}"]
        body.append([*told, f"{row['milliseconds']:.2f}", str(row["lines"])])
    return in_columns(head, body)


def table_of_maps(rows: list[dict[str, object]]) -> str:
    """Return the table of the sparse maps."""
    answers = ["second derivative", "torch.func", "torch.compile, whole graph"]
    body = []
    for row in rows:
        if "error" in row:
            body.append([str(row["library"]), "does not run: " + str(row["error"]).replace("|", "/"), *[""] * 6])
            continue
        told = [f"{row['library']} {row['version']}", str(row["map"])]
        told += [f"{row['value_error']:.0e}", f"{row['gradient_error']:.0e}", f"{row['milliseconds']:.2f}"]
        body.append([*told, *("yes" if row[answer] else "no" for answer in answers)])
    return in_columns(["library", "map", "off in value", "off in gradient", "ms", *answers], body)


def in_columns(head: list[str], body: list[list[str]]) -> str:
    """Return a table of Markdown."""
    lines_of_it = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines_of_it) + "\n"


def main() -> None:
    known = list(dict.fromkeys([*LIBRARIES, *MAPS]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--library", choices=known, help="only this one, as JSON")
    options = parser.parse_args()
    if options.draws < 2:
        parser.error("--draws must be at least 2")
    if options.library:
        rows: list[dict[str, object]] = []
        if options.library in LIBRARIES:
            rows += measure(options.library, options.draws)
        if options.library in MAPS:
            rows += measure_maps(options.library)
        print(json.dumps(rows))
        return
    rows = []
    for library in known:
        command = [sys.executable, __file__, "--library", library, "--draws", str(options.draws)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            rows.append({"library": library, "version": "?", "error": f"ended with {done.returncode}: {last}"})
        else:
            rows += json.loads(done.stdout.splitlines()[-1])
    text = markdown(rows, options.draws)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
