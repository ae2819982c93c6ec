"""The Triton kernels on a GPU: parity in full sizes, then times beside dense products and the card's ceilings.

    python benchmarks/gpu_kernels.py --out runs/gpu
    python benchmarks/gpu_kernels.py --dry-run --out runs/gpu     # no GPU: tiny sizes, interpreted, no times

Writes gpu.json and gpu.md: the card, the versions, each cell's parity and medians, and the goals reached or missed. A
cell whose parity fails is not timed.

How it is timed: by device events around each call, which are queued behind a kernel that keeps the GPU busy, so that
the host's part of a call does not count (a CUDA graph hides it in the same way; ``host_us`` reports it). All ways of a
cell take turns in shuffled order. Inputs rotate through copies that together exceed the caches. While parity is
checked, memory is poisoned with NaN, so that a result which was never written is seen.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SHAPES = ((4096, 14336), (1024, 4096))
BATCHES = (1, 8, 64, 512, 4096, 16384)
RATES = (0.1, 0.25, 0.4)
GROUPS = (1, 64, 128)
LISTS = ((384, 16384, 32, 512), (576, 32768, 32, 2048))
"""Sparse autoencoders: D, N, open units per example, B."""
BOTTLENECK = 128
DTYPE = torch.bfloat16
ROTATED = 1 << 28
"""Bytes that the inputs of consecutive calls span: several times the second-level cache of a large GPU."""
MOST_COPIES = 16
PARITY = 0.03
"""The most a row may be off; two roundings to bfloat16 make about 0.005, and twice that where they truncate, as
Triton's interpreter does."""
# What is to be reached at 10 % open, time over dense: (title, which cells, goal).
GOALS = (
    (
        "groups of 128, B ≥ 4096, forward",
        lambda c: c["group"] == 128 and c["batch"] >= 4096 and c["pass"] == "forward",
        0.15,
    ),
    (
        "groups of 128, B ≥ 4096, forward + backward",
        lambda c: c["group"] == 128 and c["batch"] >= 4096 and c["pass"] == "both",
        0.20,
    ),
    (
        "units, B = 1, 4096 → 14336, forward",
        lambda c: c["group"] == 1 and c["batch"] == 1 and c["width"] == 4096 and c["pass"] == "forward",
        0.20,
    ),
    (
        "FFN with its gater, groups, B ≥ 4096, forward",
        lambda c: c["pass"] == "ffn" and c["batch"] >= 4096 and c["group"] > 1,
        0.25,
    ),
)
Way = Callable[[int], Any]


# -------------------------------------------------------------------- problems


class Inputs:
    """Copies of the tensors of a cell."""

    def __init__(self, width: int, units: int, batch: int, group: int, rate: float, grad: bool, device: str) -> None:
        self.units, self.group, self.batch = units, group, batch
        each = DTYPE.itemsize * (units * width + batch * width + 2 * batch * units)
        self.copies = max(2, min(MOST_COPIES, -(-ROTATED // each)))

        def tensor(*shape: int, scale: float = 1.0) -> list[Tensor]:
            made = (torch.randn(shape, device=device, dtype=DTYPE) * scale for _ in range(self.copies))
            return [one.requires_grad_(grad) for one in made]

        self.x, self.bias = tensor(batch, width), tensor(units)
        self.weight = tensor(units, width, scale=width**-0.5)
        value = tensor(batch, units // group)
        self.gate = [
            (one.detach() * (torch.rand(one.shape, device=device) < rate)).requires_grad_(grad) for one in value
        ]
        self.mask = [one.detach().repeat_interleave(group, 1) != 0 for one in self.gate]
        self.upper = tensor(batch, units) if grad else []
        self.rate = rate

    def leaves(self, i: int) -> tuple[Tensor, ...]:
        return self.x[i], self.weight[i], self.bias[i], self.gate[i]


def linear_ways(p: Inputs, grad: bool, backends: tuple[str, ...]) -> dict[str, Way]:
    """Return the ways to compute a gated layer (and its gradients), by name; the first is dense."""
    from gatelet.kernels import gated_linear

    def dense(i: int) -> Tensor:
        product = F.linear(p.x[i], p.weight[i], p.bias[i])
        if p.group == 1:
            return product * p.gate[i]
        # Faster than a gate per unit: nothing is copied.
        return (product.unflatten(1, (-1, p.group)) * p.gate[i].unsqueeze(-1)).flatten(1)

    def masked(i: int) -> Tensor:
        return torch.where(p.mask[i], F.linear(p.x[i], p.weight[i], p.bias[i]), 0)

    def ours(backend: str) -> Way:
        return lambda i: gated_linear(
            p.x[i], p.weight[i], p.bias[i], p.gate[i], backend=backend, active_fraction=p.rate
        )

    forward: dict[str, Way] = {"dense": dense, "dense × mask": masked}
    if p.group > 1:
        # The peer's lists are made before the timing starts, which favours the peer.
        sorted_by_group = []
        for gate in p.gate:
            group, example = gate.detach().t().nonzero(as_tuple=True)
            sorted_by_group.append((group, example, (gate != 0).sum(0).cumsum(0).to(torch.int32)))

        def grouped(i: int) -> Tensor:
            group, example, ends = sorted_by_group[i]
            stacked = p.weight[i].unflatten(0, (-1, p.group)).transpose(1, 2)
            product = F.grouped_mm(p.x[i][example], stacked, offs=ends)
            out = p.x[i].new_zeros(p.batch, len(ends), p.group)
            values = (product + p.bias[i].unflatten(0, (-1, p.group))[group]) * p.gate[i][example, group, None]
            return out.index_put((example, group), values).flatten(1)

        forward["grouped_mm"] = grouped
    forward |= {backend: ours(backend) for backend in backends}
    if not grad:
        return forward

    def both(way: Way, masks: bool) -> Way:
        # The mask has no gradient of its own.
        return lambda i: torch.autograd.grad(way(i), p.leaves(i)[: 3 if masks else 4], p.upper[i])

    return {name: both(way, name == "dense × mask") for name, way in forward.items()}


def ffn_ways(p: Inputs, grad: bool, backends: tuple[str, ...]) -> dict[str, Way]:
    """Return a feed-forward block with its gater, and the dense block without one; forward only."""
    from gatelet.kernels import gated_ffn
    from gatelet.nn import Gater

    if grad:
        raise ValueError("the block is timed forward")
    width, groups, device = p.x[0].shape[1], p.units // p.group, p.x[0].device
    after = [torch.randn(p.units, width, device=device, dtype=DTYPE).t() / p.units**0.5 for _ in range(p.copies)]
    plain = [one.contiguous() for one in after]
    gater = Gater(width, groups, BOTTLENECK).to(device, DTYPE)
    with torch.no_grad():
        at = gater(p.x[0][:512]).float().quantile(1 - p.rate).item()

    def dense(i: int) -> Tensor:
        return F.linear(F.gelu(F.linear(p.x[i], p.weight[i], p.bias[i])), plain[i])

    def gates(i: int) -> Tensor:
        return (gater(p.x[i]) > at).to(DTYPE)

    with torch.no_grad():
        p.gate = [gates(i) for i in range(p.copies)]  # what is open is the gater's choice
        p.mask = [gate.repeat_interleave(p.group, 1) != 0 for gate in p.gate]

    def masked(i: int) -> Tensor:
        hidden = F.gelu(F.linear(p.x[i], p.weight[i], p.bias[i]))
        return F.linear((hidden.unflatten(1, (-1, p.group)) * gates(i).unsqueeze(-1)).flatten(1), plain[i])

    def ours(backend: str) -> Way:
        return lambda i: gated_ffn(
            *(p.x[i], p.weight[i], p.bias[i], gates(i), "gelu", after[i], None),
            backend=backend,
            active_fraction=p.rate,
        )

    return {"dense": dense, "dense × mask": masked, **{backend: ours(backend) for backend in backends}}


def lists_ways(shape: tuple[int, int, int, int], device: str) -> dict[str, dict[str, Way]]:
    """Return the ways to decode given codes (B, K), y[b] = Σ_k value[b, k] W[index[b, k]], by pass and name.

    Dense keeps the codes as a matrix (B, N), which is filled before the timing starts.
    """
    from gatelet.kernels.backends.triton import products
    from gatelet.kernels.pattern import Lists

    width, units, count, batch = shape
    copies = 3

    def tensor(*size: int) -> list[Tensor]:
        return [torch.randn(size, device=device) for _ in range(copies)]

    weight, upper, values = tensor(units, width), tensor(batch, width), tensor(batch, count)
    index = [torch.rand(batch, units, device=device).topk(count).indices.sort().values for _ in range(copies)]
    codes = [torch.zeros(batch, units, device=device).scatter(1, i, v) for i, v in zip(index, values, strict=True)]
    starts = torch.arange(0, batch * count + 1, count, device=device)
    leaves = [(w.clone().requires_grad_(), v.clone().requires_grad_()) for w, v in zip(weight, values, strict=True)]

    def fresh(i: int) -> Lists:
        return Lists(starts, index[i].flatten(), units)

    def ours(i: int) -> Tensor:
        return products.by_example(values[i].flatten(), weight[i], None, fresh(i))

    def ours_both(i: int) -> tuple[Tensor, ...]:
        lists, value = fresh(i), values[i].flatten()
        out = products.by_example(value, weight[i], None, lists)
        of_values, _ = products.dots(upper[i], weight[i], None, None, lists)
        of_weight, _ = products.by_unit(value, upper[i], lists)
        return out, of_weight, of_values

    def bag(i: int, w: Tensor, v: Tensor, sparse: bool = False) -> Tensor:
        return F.embedding_bag(index[i], w, per_sample_weights=v, mode="sum", sparse=sparse)

    def bag_both(i: int, sparse: bool) -> tuple[Tensor, ...]:
        out = bag(i, *leaves[i], sparse)
        of_weight, of_values = torch.autograd.grad(out, leaves[i], upper[i])
        return out, of_weight, of_values.flatten()

    def dense_both(i: int) -> tuple[Tensor, ...]:
        out = codes[i] @ weight[i]
        return out, codes[i].t() @ upper[i], (upper[i] @ weight[i].t()).gather(1, index[i]).flatten()

    return {
        "forward": {
            "dense": lambda i: codes[i] @ weight[i],
            "embedding_bag": lambda i: bag(i, weight[i], values[i]),
            "triton": ours,
        },
        "both": {
            "dense": dense_both,
            "embedding_bag": lambda i: bag_both(i, False),
            "embedding_bag, sparse gradient": lambda i: bag_both(i, True),
            "triton": ours_both,
        },
    }


# -------------------------------------------------------------------- parity


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what is allocated without a value with NaN."""
    owners = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    before = [getattr(owner, name) for owner, name in owners]

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **named: Any) -> Tensor:
            tensor = allocate(*args, **named)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocated

    try:
        for (owner, name), allocate in zip(owners, before, strict=True):
            setattr(owner, name, poison(allocate))
        yield
    finally:
        for (owner, name), allocate in zip(owners, before, strict=True):
            setattr(owner, name, allocate)


def distance(have: Tensor, want: Tensor) -> float:
    """Return the largest error of a row, over its norm or, if that is larger, the root mean square of all rows'."""
    a, b = (one.detach().reshape(len(one), -1).float() for one in (have, want))
    norms = b.norm(dim=-1)
    scale = norms.clamp_min(norms.square().mean().sqrt().clamp_min(1e-30))
    worst = ((a - b).norm(dim=-1) / scale).max()
    return worst.item() if a.isfinite().all() else float("inf")


def parity(ways: dict[str, Way], backends: tuple[str, ...], open_gates: Tensor, truth: str) -> dict[str, float]:
    """Return each of our results' distance from the truth, as one number per backend."""
    found = {}
    want = ways[truth](0)
    for backend in backends:
        with poisoned():
            have = ways[backend](0)
        pairs = list(zip(have, want, strict=True)) if isinstance(have, tuple) else [(have, want)]
        if len(pairs) == 4:  # the gate's gradient is formed on open gates only
            pairs[3] = (pairs[3][0], pairs[3][1] * open_gates)
        found[backend] = max(distance(a, b) for a, b in pairs)
    return found


# -------------------------------------------------------------------- time


class Clock:
    """Times by device events; without a GPU by the host's clock, which says nothing about a GPU."""

    def __init__(self, gpu: bool, samples: int, seconds: float) -> None:
        self.gpu, self.samples, self.seconds = gpu, samples, seconds

    def run(self, ways: dict[str, Way], copies: int) -> dict[str, dict[str, float]]:
        """Return each way's median, quartiles (ms) and the host's part (µs), all in turns."""
        for way in ways.values():
            for turn in range(2):
                way(turn % copies)
        times: dict[str, list[float]] = {name: [] for name in ways}
        host: dict[str, list[float]] = {name: [] for name in ways}
        order, begin, turn = list(ways), time.perf_counter(), 0
        while turn < self.samples and (turn < 5 or time.perf_counter() - begin < self.seconds):
            random.shuffle(order)
            for name in order:
                spent, called = self._once(ways[name], turn % copies)
                times[name].append(spent)
                host[name].append(called)
            turn += 1
        return {name: summary(each) | {"host_us": 1e6 * statistics.median(host[name])} for name, each in times.items()}

    def _once(self, way: Way, i: int) -> tuple[float, float]:
        if not self.gpu:
            start = time.perf_counter()
            way(i)
            spent = time.perf_counter() - start
            return 1e3 * spent, spent
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(4_000_000)  # about 2 ms: the host is done before the GPU begins
        start.record()
        begin = time.perf_counter()
        way(i)
        called = time.perf_counter() - begin
        end.record()
        end.synchronize()
        return start.elapsed_time(end), called


def summary(times: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"ms": middle, "low": low, "high": high, "samples": len(times)}


def ceilings(clock: Clock, device: str, tiny: bool) -> dict[str, float]:
    """Return what the card reaches: TFLOP/s of a large product, GB/s of a copy."""
    n = 64 if tiny else 8192
    a, b = (torch.randn(n, n, device=device, dtype=DTYPE) for _ in range(2))
    source = torch.empty(1 << (10 if tiny else 30), dtype=torch.uint8, device=device)
    found = clock.run({"product": lambda _: a @ b, "copy": lambda _: source.clone()}, 2)
    return {
        "tflops": 2e-9 * n**3 / found["product"]["ms"],
        "gbytes": 2e-6 * source.numel() / found["copy"]["ms"],
    }


# -------------------------------------------------------------------- cells


def cells(tiny: bool) -> Iterator[dict[str, Any]]:
    """Return the grid."""
    if tiny:
        grid = itertools.product(((48, 256),), (1, 20), RATES[:1], GROUPS[:2])
    else:
        # All cells at the first rate; at the others those that show where dense becomes faster.
        grid = itertools.chain(
            itertools.product(SHAPES, BATCHES, RATES[:1], GROUPS),
            itertools.product(SHAPES[:1], (1, 4096), RATES[1:], GROUPS[:2]),
        )
    for (width, units), batch, rate, group in grid:
        if group > GROUPS[1] and batch < 512:
            continue  # few examples read rows, however many of them a group has
        for what in ("forward", "both", "ffn"):
            if what == "ffn" and (rate != RATES[0] or not (tiny or batch == 1 or batch >= 4096)):
                continue
            yield {
                "width": width,
                "units": units,
                "batch": batch,
                "rate": rate,
                "group": group,
                "pass": what,
            }


def measure(cell: dict[str, Any], clock: Clock, device: str) -> dict[str, Any]:
    """Return the cell with its parity and times."""
    backends = ("triton", "auto")
    torch.manual_seed(0)
    p = Inputs(
        *(cell["width"], cell["units"], cell["batch"], cell["group"], cell["rate"]), cell["pass"] == "both", device
    )
    ffn = cell["pass"] == "ffn"
    with torch.set_grad_enabled(cell["pass"] == "both"):
        make = ffn_ways if ffn else linear_ways
        ways = make(p, cell["pass"] == "both", backends)
        apart = parity(ways, backends, p.gate[0] != 0, "dense × mask" if ffn else "dense")
        result = cell | {"parity": apart}
        if max(apart.values()) > PARITY:
            return result | {"failed": f"off by {max(apart.values()):.3g}, not timed"}
        with contextlib.suppress(KeyError):
            try:
                ways["grouped_mm"](0)
            except (RuntimeError, NotImplementedError) as error:
                del ways["grouped_mm"]
                result["grouped_mm"] = str(error).splitlines()[0]
        times = clock.run(ways, p.copies)
    share = p.gate[0].count_nonzero().item() / max(1, p.gate[0].numel())
    open_units = p.mask[0].any(0).sum().item()
    factor = 3 if cell["pass"] == "both" else 2 if ffn else 1
    seconds = times["triton"]["ms"] / 1e3
    return result | {
        "open": share,
        "times": times,
        "ratio": {name: each["ms"] / times["dense"]["ms"] for name, each in times.items()},
        # What the open pairs need, and the rows of weights that any example has open.
        "tflops": 2e-12 * factor * share * cell["batch"] * cell["units"] * cell["width"] / seconds,
        "gbytes": 1e-9 * factor * DTYPE.itemsize * open_units * cell["width"] / seconds,
    }


def measure_lists(shape: tuple[int, int, int, int], clock: Clock, device: str) -> list[dict[str, Any]]:
    """Return the cells of a shape: parity, then times."""
    found = []
    for what, ways in lists_ways(shape, device).items():
        have, want = ways["triton"](0), ways["dense"](0)
        pairs = zip(have, want, strict=True) if isinstance(have, tuple) else [(have, want)]
        apart = max(distance(a, b) for a, b in pairs)
        cell: dict[str, Any] = {"shape": shape, "pass": what, "parity": apart}
        if apart > PARITY:
            found.append(cell | {"failed": f"off by {apart:.3g}, not timed"})
            continue
        times = clock.run(ways, 3)
        ratio = {name: each["ms"] / times["dense"]["ms"] for name, each in times.items()}
        found.append(cell | {"times": times, "ratio": ratio})
    return found


def about(gpu: bool) -> dict[str, Any]:
    """Describe what the numbers hold for."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    found = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton,
        "gatelet": version("gatelet"),
        "python": platform.python_version(),
    }
    if not gpu:
        return found | {"card": "none: a dry run, its times mean nothing"}
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
    }


# -------------------------------------------------------------------- what is written


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = [", ".join(f"{key} {value}" for key, value in report["about"].items()), ""]
    if report["about"]["card"].startswith("none"):
        lines += ["**A dry run: interpreted on a CPU in tiny sizes. No number here says anything about a GPU.**", ""]
    top = report["ceilings"]
    lines += [
        f"Ceilings measured on this card: {top['tflops']:.0f} TFLOP/s ({DTYPE} product), "
        f"{top['gbytes']:.0f} GB/s (copy).",
        "",
        "| goal at 10 % open, time / dense | worst cell | |",
        "|---|---|---|",
    ]
    for title, belongs, goal in GOALS:
        ratios = [c["ratio"]["triton"] for c in report["cells"] if "ratio" in c and c["rate"] == 0.1 and belongs(c)]
        reached = f"{max(ratios):.2f} | {'reached' if max(ratios) <= goal else 'missed'}" if ratios else "not run | "
        lines.append(f"| {title}: {goal:.2f} | {reached} |")
    names = list(dict.fromkeys(name for c in report["cells"] for name in c.get("times", ()) if name != "dense"))
    head = ["D → N", "B", "open", "group", "pass", "dense ms", *(f"{name} / dense" for name in names)]
    head += ["TFLOP/s", "of ceiling", "GB/s", "of ceiling", "parity"]
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for c in report["cells"]:
        row = [f"{c['width']} → {c['units']}", c["batch"], f"{c['rate']:.0%}", c["group"], c["pass"]]
        if "times" in c:
            row += [f"{c['times']['dense']['ms']:.4f}"]
            row += [f"{c['ratio'][name]:.3f}" if name in c["ratio"] else "" for name in names]
            row += [f"{c['tflops']:.1f}", f"{c['tflops'] / top['tflops']:.0%}"]
            row += [f"{c['gbytes']:.0f}", f"{c['gbytes'] / top['gbytes']:.0%}", f"{max(c['parity'].values()):.4f}"]
        else:
            row += [c["failed"]] + [""] * (len(head) - 6)
        lines.append("| " + " | ".join(str(each) for each in row) + " |")
    lines += ["", "Codes of a sparse autoencoder decoded, float32 (dense: codes as a matrix of B × N):", ""]
    lines += [
        "| D, N, open, B | pass | dense ms | embedding_bag / dense | … sparse gradient | triton / dense | parity |"
    ]
    lines += ["|---" * 7 + "|"]
    for c in report["lists"]:
        row = [", ".join(map(str, c["shape"])), c["pass"]]
        if "times" in c:
            others = ("embedding_bag", "embedding_bag, sparse gradient", "triton")
            row += [f"{c['times']['dense']['ms']:.4f}"]
            row += [f"{c['ratio'][name]:.3f}" if name in c["ratio"] else "" for name in others]
            row += [f"{c['parity']:.1e}"]
        else:
            row += [c["failed"], "", "", "", ""]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu.json and gpu.md")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: tiny sizes, interpreted")
    parser.add_argument("--samples", type=int, default=50, help="most samples per way and cell")
    parser.add_argument("--seconds", type=float, default=1.0, help="most seconds per cell, once it has 5 samples")
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run runs the script without one")
    device = "cpu" if options.dry_run else "cuda"
    clock = Clock(not options.dry_run, 2 if options.dry_run else options.samples, options.seconds)
    report: dict[str, Any] = {"about": about(clock.gpu), "ceilings": ceilings(clock, device, options.dry_run)}
    report["cells"], report["lists"] = [], []
    options.out.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        # Written after every cell, so that an interrupted run keeps what it measured.
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1))
        (options.out / "gpu.md").write_text(markdown(report))

    def show(found: dict[str, Any]) -> None:
        shown = found.get("ratio" if clock.gpu else "parity", {})
        ratios = "  ".join(f"{name} {value:.3f}" for name, value in shown.items()) if isinstance(shown, dict) else shown
        about = (
            f"{key} {found[key]}"
            for key in ("width", "units", "shape", "batch", "rate", "group", "pass")
            if key in found
        )
        print(*about, found.get("failed", ratios), flush=True)

    for shape in ((12, 96, 5, 7),) if options.dry_run else LISTS:
        report["lists"] += (found := measure_lists(shape, clock, device))
        for each in found:
            show(each)
    for cell in cells(options.dry_run):
        try:
            each = measure(cell, clock, device)
        except torch.OutOfMemoryError:
            each = cell | {"failed": "does not fit into this card's memory"}
        if clock.gpu:
            torch.cuda.empty_cache()
        report["cells"].append(each)
        show(each)
        keep()
    if any("off by" in c.get("failed", "") for c in report["cells"] + report["lists"]):
        raise SystemExit("parity failed: see gpu.md")


if __name__ == "__main__":
    main()
