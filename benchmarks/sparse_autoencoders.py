"""Sparse autoencoders beside SAELens and EleutherAI's sparsify, on the same activations and processor.

    python benchmarks/sparse_autoencoders.py speed                       # steps, memory, encoding and decoding
    python benchmarks/sparse_autoencoders.py train METHOD --cache DIR --held-out DIR --seconds 150 --out FILE
    python benchmarks/sparse_autoencoders.py table FILE...               # what the runs reached
    python benchmarks/sparse_autoencoders.py format                      # SAELens reads what we write, and the reverse

The peers are optional: pip install sae-lens==6.54.0 eai-sparsify==1.3.3. METHOD is a name of METHODS. Caches are those
of `gatelet train sae`. Training time is the processor's (one thread), not the clock's: runs may share a machine.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatelet
from gatelet.nn import SparseAutoencoder
from gatelet_lab.sae.activations import Cache

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its Triton decoder is for GPUs
SHAPES = ((576, 16384, 32, 1024), (576, 32768, 32, 2048))
RATE = 5e-4


class Dense(nn.Module):
    """A top-k autoencoder by dense products and PyTorch's derivatives, with fused Adam and unit decoder rows."""

    def __init__(self, d: int, n: int, k: int, rate: float = RATE) -> None:
        super().__init__()
        self.k = k
        rows = F.normalize(torch.randn(n, d), dim=1)
        self.w_enc, self.w_dec = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(d))
        self.optimizer = torch.optim.Adam(self.parameters(), rate, fused=True)

    def encode(self, x: Tensor) -> Tensor:
        z = F.linear(x - self.b_dec, self.w_enc, self.b_enc)
        best = z.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(z).scatter(-1, best.indices, best.values.relu())

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.w_dec + self.b_dec

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def step(self, x: Tensor) -> None:
        loss = (self.reconstruct(x) - x).square().sum(-1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            grad = self.w_dec.grad
            grad.addcmul_(self.w_dec, torch.linalg.vecdot(grad, self.w_dec)[:, None], value=-1)
            self.optimizer.step()
            self.w_dec.copy_(F.normalize(self.w_dec, dim=1))

    def l0(self, x: Tensor) -> Tensor:
        return (self.encode(x) != 0).sum(-1)

    def opened(self, x: Tensor) -> Tensor:
        return (self.encode(x) != 0).any(0)


class Ours:
    """gatelet's layer with RowAdam."""

    def __init__(self, d: int, n: int, k: int, rate: float = RATE, **options) -> None:
        self.sae = SparseAutoencoder(d, n, k=k, sparse_grad=True, dead_after=200_000, **options)
        rest = [p for name, p in self.sae.named_parameters() if name != "decoder_weight"]
        groups = [{"params": [self.sae.decoder_weight], "unit_rows": True}, {"params": rest}]
        self.optimizer = gatelet.RowAdam(groups, rate)

    def step(self, x: Tensor) -> None:
        self.sae.train()
        loss = self.sae.loss(x)
        self.optimizer.zero_grad()
        loss.total.backward()
        self.optimizer.step()

    def encode(self, x: Tensor):
        return self.sae.encode(x)

    def decode(self, code) -> Tensor:
        return self.sae.decode(code)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.eval()(x)

    def l0(self, x: Tensor) -> Tensor:
        return self.sae.eval().encode(x).l0

    def opened(self, x: Tensor) -> Tensor:
        return self.sae.eval().encode(x).opened()


class SAELens:
    """sae-lens' TopKTrainingSAE, stepped as its trainer does."""

    def __init__(self, d: int, n: int, k: int, rate: float = RATE) -> None:
        from sae_lens.saes.sae import TrainStepInput
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        self.input = TrainStepInput
        self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=n, k=k))
        self.optimizer = torch.optim.Adam(self.sae.parameters(), rate)
        self.idle, self.steps = torch.zeros(n), 0

    def step(self, x: Tensor) -> None:
        dead = self.idle * len(x) > 200_000
        given = self.input(
            sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=self.steps, is_logging_step=False
        )
        found = self.sae.training_forward_pass(given)
        with torch.no_grad():
            fired = found.feature_acts.bool().float().sum(-2).bool()
            self.idle += 1
            self.idle[fired] = 0
        found.loss.backward()
        nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x)

    def l0(self, x: Tensor) -> Tensor:
        return (self.sae.encode(x) != 0).sum(-1)

    def opened(self, x: Tensor) -> Tensor:
        return (self.sae.encode(x) != 0).any(0)


class Sparsify:
    """EleutherAI's SparseCoder, stepped as its trainer does, with its default optimiser or with Adam."""

    def __init__(self, d: int, n: int, k: int, rate: float = RATE, optimizer: str = "signum") -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        self.sae = SparseCoder(d, SparseCoderConfig(num_latents=n, k=k))
        if optimizer == "signum":
            from schedulefree import ScheduleFreeWrapper
            from sparsify.sign_sgd import SignSGD

            self.optimizer = ScheduleFreeWrapper(
                SignSGD(self.sae.parameters(), lr=5e-3 / (n / 2**14) ** 0.5), momentum=0.95
            )
            self.optimizer.train()
        else:
            self.optimizer = torch.optim.Adam(self.sae.parameters(), rate, fused=True)

    def step(self, x: Tensor) -> None:
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.sae.set_decoder_norm_to_unit_norm()
        found = self.sae(x)
        found.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def reconstruct(self, x: Tensor) -> Tensor:
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        return self.sae(x).sae_out

    def l0(self, x: Tensor) -> Tensor:
        return (self.sae(x).latent_acts > 0).sum(-1)

    def opened(self, x: Tensor) -> Tensor:
        found = self.sae(x)
        return torch.zeros(self.sae.num_latents).index_fill(0, found.latent_indices[found.latent_acts > 0], 1) > 0


METHODS: dict[str, Callable[..., object]] = {
    "dense": Dense,
    "top_k": Ours,
    "batch_top_k": lambda *sizes: Ours(*sizes, activation="batch_top_k"),
    "jump_relu": lambda *sizes: Ours(*sizes, activation="jump_relu"),
    "switch 8, 2 open": lambda *sizes: Ours(*sizes, groups=8, open_groups=2),
    "sae-lens": SAELens,
    "eai-sparsify": Sparsify,
    "eai-sparsify, Adam": lambda *sizes: Sparsify(*sizes, optimizer="adam"),
}


# -------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> None:
    """Train a method on cached activations, scaled to length √D, for some seconds of one processor."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cache, held = Cache(args.cache), Cache(args.held_out)
    d = cache.width
    some = cache.sample(20_000)
    scale = d**0.5 / some.norm(dim=1).mean()
    test = held.rows.float() * scale
    spread = (test - test.mean(0)).square().sum()
    method = METHODS[args.method](d, args.latents, args.k)
    start_at(method, some * scale)
    rows, spent, due = [], 0.0, itertools.count(0, args.every)
    following = next(due)
    for steps, x in enumerate(cache.batches(args.batch, seed=0)):
        if spent >= following or spent >= args.seconds:
            with torch.no_grad():
                parts = test.split(1024)
                left = sum((method.reconstruct(part) - part).square().sum() for part in parts)
                opened = torch.stack([method.opened(part) for part in parts]).any(0)
                l0 = torch.cat([method.l0(part) for part in parts]).float().mean()
            row = {"seconds": spent, "tokens": steps * args.batch, "explained": 1 - (left / spread).item()}
            rows.append(row | {"l0": l0.item(), "closed": (~opened).float().mean().item()})
            print(args.method, rows[-1], flush=True)
            write(args, rows, steps, spent)
            following = next(due)
        if spent >= args.seconds:
            return
        began = time.process_time()
        method.step(x * scale)
        spent += time.process_time() - began if steps else 0.0  # the first step compiles


def write(args: argparse.Namespace, rows: list, steps: int, spent: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    told = {"method": args.method, "latents": args.latents, "k": args.k, "batch": args.batch, "rows": rows}
    told |= {"step_ms": 1e3 * spent / max(1, steps - 1), "peak_gib": peak}
    args.out.write_text(json.dumps(told, indent=1))


@torch.no_grad()
def start_at(method: object, x: Tensor) -> None:
    """Start every method's decoder bias at the mean; ours has a threshold to set too."""
    if isinstance(method, Ours):
        method.sae.start_from(x)
    else:
        owner = getattr(method, "sae", method)
        owner.b_dec.data.copy_(x.mean(0))


def table(args: argparse.Namespace) -> None:
    """Print what the runs reached at the same processor seconds and at the same tokens."""
    runs = [json.loads(file.read_text()) for file in args.files]
    seconds = min(run["rows"][-1]["seconds"] for run in runs)
    tokens = min(run["rows"][-1]["tokens"] for run in runs)
    print(f"latents {runs[0]['latents']}, k {runs[0]['k']}, batch {runs[0]['batch']}, one thread")
    names = (f"explained at {seconds:.0f} s", "tokens by then", f"explained at {tokens:,} tokens", "L0", "closed")
    print("| | " + " | ".join((*names, "ms per step", "peak GiB")) + " |")
    print("|---|---|---|---|---|---|---|---|")
    for run in runs:
        in_time = max((r for r in run["rows"] if r["seconds"] <= seconds * 1.02), key=lambda r: r["seconds"])
        alike = min(run["rows"], key=lambda r: abs(r["tokens"] - tokens))
        print(
            f"| {run['method']} | {in_time['explained']:.3f} | {in_time['tokens']:,} | {alike['explained']:.3f} "
            f"({alike['tokens']:,}) | {in_time['l0']:.0f} | {in_time['closed']:.1%} | {run['step_ms']:.0f} | "
            f"{run['peak_gib']:.2f} |"
        )


# -------------------------------------------------------------------- speed


def timed(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each case; the cases take turns."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(rounds + 1):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            if index:
                found[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in found.items()}


def speed(args: argparse.Namespace) -> None:
    """Print each method's training step, encoding and decoding, as ratios to the dense one."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    d, n, k, b = SHAPES[args.shape]
    x = torch.randn(b, d)
    names = [name for name in args.methods if available(name)]
    print(f"D = {d}, N = {n}, K = {k}, B = {b}, {args.threads} threads, torch {torch.__version__}")
    methods = {name: METHODS[name](d, n, k) for name in names}
    steps = timed({name: lambda m=m: m.step(x) for name, m in methods.items()}, args.rounds)
    for name in names:
        print(f"step {name}: {steps[name]:.1f} ms, {steps[name] / steps[names[0]]:.3f} of {names[0]}", flush=True)
    if {"dense", "top_k"} <= methods.keys():
        for rows in (1, b):
            inference(methods["dense"], methods["top_k"], x[:rows])


@torch.no_grad()
def inference(dense: Dense, ours: Ours, x: Tensor) -> None:
    ours.sae.eval()
    f, code = dense.encode(x), ours.encode(x)
    cases = {
        "dense encode": lambda: dense.encode(x),
        "our encode": lambda: ours.encode(x),
        "dense decode": lambda: dense.decode(f),
        "our decode": lambda: ours.decode(code),
        "dense both": lambda: dense.reconstruct(x),
        "our both": lambda: ours.reconstruct(x),
    }
    found = timed(cases, 15 if len(x) == 1 else 5)
    for what in ("encode", "decode", "both"):
        mine, theirs = found[f"our {what}"], found[f"dense {what}"]
        print(f"{what}, B = {len(x)}: {mine:.3f} ms, {mine / theirs:.3f} of dense's {theirs:.3f}", flush=True)


def available(name: str) -> bool:
    try:
        METHODS[name](4, 8, 2)
    except ImportError as error:
        print(f"{name}: not installed ({error})")
        return False
    return True


def memory(args: argparse.Namespace) -> None:
    """Print each method's peak of resident memory over some steps, less that of a process that does nothing."""
    if args.alone:
        d, n, k, b = SHAPES[args.shape]
        torch.set_num_threads(args.threads)
        METHODS[args.alone](4, 8, 2).step(torch.randn(2, 4))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        x, method = torch.randn(b, d), METHODS[args.alone](d, n, k)
        for _ in range(3):
            method.step(x)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return
    for name in args.methods:
        command = [sys.executable, __file__, "memory", "--alone", name, "--shape", str(args.shape)]
        found = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"MALLOC_ARENA_MAX": "1"}
        )
        told = found.stderr[-300:] if found.returncode else found.stdout.strip().splitlines()[-1] + " MiB"
        print(f"memory {name}: {told}", flush=True)


# -------------------------------------------------------------------- the format


def exchange(args: argparse.Namespace) -> None:
    """Check that sae-lens reads what we write and we read what it writes, to 1e-6 of the outputs."""
    import tempfile

    from sae_lens import SAE
    from sae_lens.saes import (
        GatedSAE,
        GatedSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
    )

    from gatelet.nn import load_sae_lens

    torch.manual_seed(0)
    x, ok = torch.randn(50, 24), True
    with tempfile.TemporaryDirectory() as folder:
        for activation in ("top_k", "batch_top_k", "jump_relu", "relu", "gated"):
            sae = SparseAutoencoder(24, 96, activation, k=6).eval()
            sae.start_from(x * 3 + 1)
            with torch.no_grad():
                sae.encoder_bias.add_(torch.randn(96) / 4)
                sae.threshold.fill_(1.1)
            sae.save_sae_lens(folder)
            theirs = SAE.load_from_disk(folder)
            ok &= agree(f"{activation}, ours read by sae-lens", sae, theirs, x)
        kinds = (
            (TopKSAE, TopKSAEConfig, {"k": 6}),
            (TopKSAE, TopKSAEConfig, {"k": 6, "rescale_acts_by_decoder_norm": True}),
        )
        kinds += (
            (JumpReLUSAE, JumpReLUSAEConfig, {}),
            (StandardSAE, StandardSAEConfig, {}),
            (GatedSAE, GatedSAEConfig, {}),
        )
        for kind, config, options in kinds:
            theirs = kind(config(d_in=24, d_sae=96, **options))
            with torch.no_grad():
                for p in theirs.parameters():
                    p.copy_(torch.randn_like(p) / 5)
                if hasattr(theirs, "threshold"):
                    theirs.threshold.abs_()
            theirs.save_model(folder)
            ok &= agree(f"{kind.__name__}, theirs read by us", load_sae_lens(folder).eval(), theirs, x)
    sys.exit(0 if ok else 1)


@torch.no_grad()
def agree(name: str, ours: SparseAutoencoder, theirs: nn.Module, x: Tensor) -> bool:
    code = (ours.encode(x).to_dense() - theirs.encode(x)).abs().max() / theirs.encode(x).abs().max()
    output = (ours(x) - theirs(x)).abs().max() / theirs(x).abs().max()
    print(f"{name}: codes differ by {code:.1e}, outputs by {output:.1e}")
    return bool(code < 1e-6 and output < 1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train")
    one.add_argument("method", choices=METHODS)
    for option in ("--cache", "--held-out", "--out"):
        one.add_argument(option, type=Path, required=True)
    for option, value in (("--seconds", 150), ("--every", 10), ("--latents", 16384), ("--k", 32), ("--batch", 1024)):
        one.add_argument(option, type=int, default=value)
    one.set_defaults(run=train)
    two = commands.add_parser("table")
    two.add_argument("files", type=Path, nargs="+")
    two.set_defaults(run=table)
    for name, run in (("speed", speed), ("memory", memory)):
        three = commands.add_parser(name)
        three.add_argument(
            "--methods", nargs="+", default=["dense", "top_k", "sae-lens", "eai-sparsify", "eai-sparsify, Adam"]
        )
        for option, value in (("--shape", 0), ("--threads", 2), ("--rounds", 5)):
            three.add_argument(option, type=int, default=value)
        three.add_argument("--alone")
        three.set_defaults(run=run)
    commands.add_parser("format").set_defaults(run=exchange)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
