"""Gradient estimators of other libraries on one problem: bias, variance, time, lines of user code.

    python benchmarks/peers_estimators.py --draws 2000 --json peers.json --markdown peers.md

Optional installs, in an environment of their own (torch first, the peers with --no-deps): storchastic==0.3.7,
relaxit==1.2.1, reinmax, pyro-ppl. A library that is missing or fails is reported as such. Each runs in a process of its
own, because storchastic patches torch at import.

The problem: three Bernoulli units with logits a, E[(w·h − t)²], whose exact gradient is enumerated here. A case is a
function of a that does all that its user has to write, up to backward(); its lines are counted. Where a method draws
several samples it draws two.
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


def exact():
    """Return the gradient by enumeration, in float64."""
    a = LOGITS.double().requires_grad_()
    total = a.new_zeros(())
    for bits in product((0.0, 1.0), repeat=3):
        h = torch.tensor(bits, dtype=torch.float64)
        chance = torch.where(h > 0, a.sigmoid(), 1 - a.sigmoid()).prod()
        total = total + chance * ((h * WEIGHT.double()).sum() - TARGET) ** 2
    return torch.autograd.grad(total, a)[0]


# Library -> its cases: (name, whether it declares to be unbiased for Bernoulli units, function).
Cases = list[tuple[str, bool, Callable[[torch.Tensor], None]]]


def _gatelet() -> Cases:
    import gatelet

    def case(estimator: str, samples: int, **options: object) -> tuple[str, bool, Callable[[torch.Tensor], None]]:
        method = gatelet.estimators.ALL[estimator](**options)

        def call(a):
            gatelet.surrogate(f, a, method, samples=samples).backward()

        told = ", ".join(f"{key}={value}" for key, value in options.items())
        return f"{estimator}({told})" if told else estimator, method.unbiased and method.binary, call

    return [
        case("score_function", 1, baseline="none"),
        case("score_function", 1, baseline="running_mean"),
        case("leave_one_out", 2),
        case("arm", 2),
        case("disarm", 2),
        case("rebar", 1),
        case("relax", 1),
        case("muprop", 1),
        case("local_expectation", 1),
        case("enumeration", 1),
        case("straight_through", 1, slope="sigmoid"),
        case("reinmax", 1),
        case("concrete", 1, temperature=0.5),
        case("straight_through_gumbel", 1, temperature=0.5),
        case("hard_concrete", 1),
        case("smooth_times_stochastic", 1),
    ]


def _torch() -> Cases:
    from torch.distributions import Bernoulli, RelaxedBernoulli

    def score_function(a):
        distribution = Bernoulli(logits=a)
        h = distribution.sample()
        loss = f(h)
        (loss + loss.detach() * distribution.log_prob(h).sum(-1)).backward()

    def relaxed_bernoulli(a):
        h = RelaxedBernoulli(torch.tensor(0.5), logits=a).rsample()
        f(h).backward()

    return [
        ("score function, log_prob", True, score_function),
        ("RelaxedBernoulli(0.5)", False, relaxed_bernoulli),
    ]


def _storchastic() -> Cases:
    import storch
    from storch.method import ARM, REBAR, RELAX, DisARM, Expect, GumbelSoftmax, ScoreFunction
    from torch.distributions import Bernoulli

    def case(name: str, unbiased: bool, method: object) -> tuple[str, bool, Callable[[torch.Tensor], None]]:
        def call(a):
            h = method(Bernoulli(logits=a))
            storch.add_cost(f(h), "loss")
            storch.backward()

        return name, unbiased, call

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
    ]


def _relaxit() -> Cases:
    from relaxit.distributions import HardConcrete, RebarRelaxation, StochasticTimesSmooth, StraightThroughBernoulli

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

    return [
        ("StraightThroughBernoulli", False, straight_through),
        ("RebarRelaxation(0.5)", False, rebar),
        ("HardConcrete", False, hard_concrete),
        ("StochasticTimesSmooth", False, smooth),
    ]


def _reinmax() -> Cases:
    from reinmax import reinmax

    def two_classes(a):
        h, _ = reinmax(torch.stack([a, torch.zeros_like(a)], -1), 1.0)
        f(h[..., 0]).backward()

    return [("reinmax, Bernoulli as two classes", False, two_classes)]


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

    return [
        ("Trace_ELBO", True, trace),
        ("TraceGraph_ELBO", True, trace_graph),
        ("TraceEnum_ELBO, parallel", True, enumerated),
        ("RelaxedBernoulliStraightThrough(0.5)", False, straight_through),
    ]


LIBRARIES: dict[str, tuple[str, Callable[[], Cases]]] = {
    "gatelet": ("gatelet", _gatelet),
    "torch.distributions": ("torch", _torch),
    "storchastic": ("storchastic", _storchastic),
    "relaxit": ("relaxit", _relaxit),
    "reinmax": ("reinmax", _reinmax),
    "pyro": ("pyro-ppl", _pyro),
}


def measure(library: str, draws: int) -> list[dict[str, object]]:
    """Return a row per case of one library."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    package, cases = LIBRARIES[library]
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "source"  # gatelet from a checkout
    try:
        listed = cases()
    except Exception as error:
        return [{"library": library, "version": found, "error": f"{type(error).__name__}: {error}"}]
    reference, rows = exact(), []
    for name, unbiased, call in listed:
        row: dict[str, object] = {"library": library, "version": found, "case": name, "unbiased": unbiased}
        row["lines"] = lines(call)
        try:
            gradients, milliseconds = sample(call, draws)
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
    """Return so many gradients, and the median milliseconds of one."""
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
    """Return the table."""
    head = ["library", "case", "claims unbiased", "bias (standard errors)", "relative bias", "variance", "ms", "lines"]
    body = []
    for row in rows:
        told = [f"{row['library']} {row['version']}", str(row.get("case", "–"))]
        if "error" in row:
            body.append([*told, "does not run: " + str(row["error"]).replace("|", "/"), *[""] * 5])
            continue
        told += ["yes" if row["unbiased"] else "no"]
        if not row["finite"]:
            body.append([*told, "not finite", "", "", f"{row['milliseconds']:.2f}", str(row["lines"])])
            continue
        told += [f"{row['bias_in_standard_errors']:.1f}", f"{row['relative_bias']:.3f}", f"{row['variance']:.4f}"]
        body.append([*told, f"{row['milliseconds']:.2f}", str(row["lines"])])
    text = "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])
    where = f"{date.today()}, {draws} draws, seed 0, torch {torch.__version__}, {platform.system()}, one thread"
    told = "[" + ", ".join(f"{value:.4f}" for value in exact().tolist()) + "]"
    return f"{where}. Exact gradient: {told}.\n\n{text}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--library", choices=LIBRARIES, help="only this one, as JSON")
    options = parser.parse_args()
    if options.draws < 2:
        parser.error("--draws must be at least 2")
    if options.library:
        print(json.dumps(measure(options.library, options.draws)))
        return
    rows: list[dict[str, object]] = []
    for library in LIBRARIES:
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
