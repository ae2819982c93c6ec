"""Sparse autoencoders beside SAELens and EleutherAI's sparsify, on the same activations and processor.

    python benchmarks/sparse_autoencoders.py speed                       # steps, encoding and decoding
    python benchmarks/sparse_autoencoders.py memory                      # peaks of a step
    python benchmarks/sparse_autoencoders.py train --activations DIR --out DIR      # a run per method and rate, in turn
    python benchmarks/sparse_autoencoders.py table --activations DIR --out DIR --model MODEL   # what they reached
    python benchmarks/sparse_autoencoders.py format                      # SAELens reads what we write, and the reverse

The peers are optional: pip install sae-lens==6.54.0 eai-sparsify==1.3.3. The activations are those of
`gatelet train sae` (its --cache). Training time is the processor's (one thread), not the clock's; on a busy machine
give --step-ms, which `speed --threads 1 --activations DIR` prints. Every method trains at several learning rates; the
table shows each at the rate that explained most of tokens which no run trained on and which are not those of the table.
A run whose file lies in --out is not repeated.
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
from gatelet_lab.sae.activations import SKIPPED, Cache

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its Triton decoder is for GPUs
SHAPES = ((576, 16384, 32, 1024), (576, 32768, 32, 2048))
RATE = 2e-3
"""Adam's learning rate, of which --times gives multiples."""
SIGN_RATE = 5e-3
"""The same of eai-sparsify's own optimiser for 16,384 latents, its default."""
VALIDATION = 8
"""This many batches of the training activations choose the rate and are not trained on."""
DEAD = 200_000
"""A latent that this many tokens did not open counts as dead."""


class Dense(nn.Module):
    """A top-k autoencoder by dense products and PyTorch's derivatives, with fused Adam and unit decoder rows."""

    def __init__(self, d: int, n: int, k: int, times: float = 1.0) -> None:
        super().__init__()
        self.k = k
        rows = F.normalize(torch.randn(n, d), dim=1)
        self.w_enc, self.w_dec = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(d))
        self.optimizer = torch.optim.Adam(self.parameters(), RATE * times, fused=True)

    def encode(self, x: Tensor) -> Tensor:
        z = F.linear(x - self.b_dec, self.w_enc, self.b_enc)
        best = z.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(z).scatter(-1, best.indices, best.values.relu())

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.w_dec + self.b_dec

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def step(self, x: Tensor) -> None:
        (self.reconstruct(x) - x).square().sum(-1).mean().backward()
        if self.optimizer is not None:
            self.update(self.optimizer)

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the parameters that have a gradient, and free the gradients; decoder rows keep unit length."""
        grad = self.w_dec.grad
        if grad is not None:
            grad.addcmul_(self.w_dec, torch.linalg.vecdot(grad, self.w_dec)[:, None], value=-1)
        optimizer.step()
        optimizer.zero_grad()
        if grad is not None:
            self.w_dec.div_(torch.linalg.vector_norm(self.w_dec, dim=1, keepdim=True))

    def look(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction, how many latents each example opens, and which any opens."""
        f = self.encode(x)
        return self.decode(f), (f != 0).sum(-1), (f != 0).any(0)


class Ours:
    """gatelet's layer with RowAdam."""

    def __init__(self, d: int, n: int, k: int, times: float = 1.0, long_encoder: bool = False, **options) -> None:
        self.long_encoder = long_encoder
        self.sae = SparseAutoencoder(d, n, k=k, dead_after=DEAD, **{"sparse_grad": True} | options)
        self.optimizer = gatelet.RowAdam(self.sae.parameter_groups(RATE * times))

    def step(self, x: Tensor) -> None:
        self.sae.train()
        self.sae.loss(x).total.backward()
        if self.optimizer is not None:
            self.update(self.optimizer)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the parameters that have a gradient, and free the gradients."""
        optimizer.step()
        optimizer.zero_grad()

    def encode(self, x: Tensor):
        return self.sae.encode(x)

    def decode(self, code) -> Tensor:
        return self.sae.decode(code)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.eval()(x)

    def look(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = self.sae.eval().encode(x)
        return self.sae.decode(code), code.l0, code.opened()

    @property
    def idle(self) -> Tensor:
        return self.sae.idle


class SAELens:
    """sae-lens' TopKTrainingSAE, stepped as its trainer does."""

    def __init__(self, d: int, n: int, k: int, times: float = 1.0) -> None:
        from sae_lens.saes.sae import TrainStepInput
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        self.input = TrainStepInput
        self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=n, k=k))
        self.optimizer = torch.optim.Adam(self.sae.parameters(), RATE * times)
        self.idle, self.steps = torch.zeros(n), 0

    def step(self, x: Tensor) -> None:
        dead = self.idle > DEAD
        given = self.input(
            sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=self.steps, is_logging_step=False
        )
        found = self.sae.training_forward_pass(given)
        with torch.no_grad():
            fired = found.feature_acts.bool().float().sum(-2).bool()
            self.idle += len(x)
            self.idle[fired] = 0
        found.loss.backward()
        nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def look(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f = self.sae.encode(x)
        return self.sae.decode(f), (f != 0).sum(-1), (f != 0).any(0)


class Sparsify:
    """EleutherAI's SparseCoder, stepped as its trainer does, with its default optimiser or with Adam."""

    def __init__(self, d: int, n: int, k: int, times: float = 1.0, optimizer: str = "signum") -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        self.sae, self.idle = SparseCoder(d, SparseCoderConfig(num_latents=n, k=k)), torch.zeros(n)
        if optimizer == "signum":
            from schedulefree import ScheduleFreeWrapper
            from sparsify.sign_sgd import SignSGD

            self.optimizer = ScheduleFreeWrapper(
                SignSGD(self.sae.parameters(), lr=times * SIGN_RATE / (n / 2**14) ** 0.5), momentum=0.95
            )
            self.optimizer.train()
        else:
            self.optimizer = torch.optim.Adam(self.sae.parameters(), RATE * times, fused=True)

    def step(self, x: Tensor) -> None:
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.sae.set_decoder_norm_to_unit_norm()
        found = self.sae(x)
        found.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.idle += len(x)
        self.idle[found.latent_indices.flatten()] = 0

    def look(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        found = self.sae(x)
        opened = torch.zeros(self.sae.num_latents, dtype=torch.bool)
        opened[found.latent_indices[found.latent_acts > 0]] = True
        return found.sae_out, (found.latent_acts > 0).sum(-1), opened


METHODS: dict[str, Callable[..., object]] = {
    "dense": Dense,
    "top_k": Ours,
    "batch_top_k": lambda *sizes: Ours(*sizes, activation="batch_top_k"),
    "jump_relu": lambda *sizes: Ours(*sizes, activation="jump_relu"),
    "groups=8, open_groups=2": lambda *sizes: Ours(*sizes, groups=8, open_groups=2),
    # What the start and the optimiser matter: on dense gradients RowAdam is torch's Adam.
    "top_k, encoder as long as the decoder": lambda *sizes: Ours(*sizes, long_encoder=True),
    "top_k, dense gradients": lambda *sizes: Ours(*sizes, sparse_grad=False),
    "sae-lens": SAELens,
    "eai-sparsify": Sparsify,
    "eai-sparsify, Adam": lambda *sizes: Sparsify(*sizes, optimizer="adam"),
}


# -------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> None:
    """Train the methods at each rate on the same activations, every run in a process of its own."""
    args.out.mkdir(parents=True, exist_ok=True)
    if args.alone:
        train_one(args)
        return
    for name, times in itertools.product(args.methods, args.times):
        file = file_of(args, name, times)
        if not (file.is_file() and len(json.loads(file.read_text())["marks"]) == 2) and available(name):
            rest = [
                word
                for key in ("seconds", "tokens", "latents", "k", "batch")
                for word in (f"--{key}", str(getattr(args, key)))
            ]
            rest += ["--step-ms", str(args.step_ms)] if args.step_ms else []
            command = [sys.executable, __file__, "train", "--alone", name, "--times", str(times), *rest]
            subprocess.run([*command, "--activations", str(args.activations), "--out", str(args.out)], check=True)


def file_of(args: argparse.Namespace, name: str, times: float) -> Path:
    return args.out / f"{''.join(c if c.isalnum() else '_' for c in name)}.{times:g}.json"


def train_one(args: argparse.Namespace) -> None:
    """Train a method on activations scaled to length √D, until both the seconds and the tokens are spent.

    At each of the two marks the held-out rows' reconstructions are kept beside the measures.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, (times,) = args.alone, args.times
    cache, held = Cache(args.activations / "training"), Cache(args.activations / "held-out")
    some = cache.sample(20_000)
    scale = cache.width**0.5 / some.norm(dim=1).mean()
    METHODS[name](4, 8, 2).step(torch.randn(2, 4))  # imports and compiles
    before = peak()
    method = METHODS[name](cache.width, args.latents, args.k, times)
    start_at(method, some * scale)
    told = {"method": name, "times": times, "latents": args.latents, "k": args.k, "batch": args.batch}
    marks, spent, steps, batches = {}, 0.0, 0, cache.batches(args.batch, seed=0)
    validation = torch.cat([next(batches) for _ in range(VALIDATION)]) * scale
    while len(marks) < 2:
        x = next(batches) * scale
        began = time.process_time()
        method.step(x)
        if steps:  # the first step compiles the rest
            spent += args.step_ms / 1e3 if args.step_ms else time.process_time() - began
        steps += 1
        tokens = steps * args.batch
        if len(cache.rows) < tokens + len(validation):
            sys.exit("the activations are used up: --seconds and --tokens ask for too many")
        due = {"seconds": spent >= args.seconds, "tokens": tokens >= args.tokens}
        for mark in (mark for mark, reached in due.items() if reached and mark not in marks):
            told |= {"step_ms": 1e3 * spent / (steps - 1), "peak_gib": peak() - before}
            marks[mark] = {"seconds": spent, "tokens": tokens, "dead": int((method.idle >= DEAD).sum())}
            marks[mark]["validation"] = examine(method, validation)["explained"]
            marks[mark] |= examine(method, held.rows.float() * scale, file_of(args, name, times), mark, scale)
            print(name, f"{times:g} times", mark, marks[mark], f"{told['step_ms']:.0f} ms per step", flush=True)
            file_of(args, name, times).write_text(json.dumps(told | {"marks": marks}, indent=1))


def peak() -> float:
    """Return the largest resident memory so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def examine(
    method: object, x: Tensor, file: Path | None = None, mark: str = "", scale: Tensor | None = None
) -> dict[str, float]:
    """Return what rows show; keep their reconstructions, in the model's units, beside a file."""
    found, l0, opened = zip(*(method.look(part) for part in x.split(1024)), strict=True)
    output = torch.cat(found)
    if file is not None:
        torch.save((output / scale).bfloat16(), file.with_suffix(f".{mark}.pt"))
    left = (output - x).square().sum() / (x - x.mean(0)).square().sum()
    closed = 1 - torch.stack(opened).any(0).float().mean()
    return {"explained": 1 - left.item(), "l0": torch.cat(l0).float().mean().item(), "closed": closed.item()}


@torch.no_grad()
def start_at(method: object, x: Tensor) -> None:
    """Start every method's decoder bias at the mean; ours has a threshold to set too."""
    if isinstance(method, Ours):
        method.sae.start_from(x)
        if method.long_encoder:
            method.sae.encoder_weight.copy_(method.sae.decoder_weight)
    else:
        owner = getattr(method, "sae", method)
        owner.b_dec.data.copy_(x.mean(0))


def table(args: argparse.Namespace) -> None:
    """Print what the methods reached at the same processor seconds and at the same tokens, each at its best rate."""
    runs = []
    for name in args.methods:
        files = [file_of(args, name, times) for times in args.times]
        runs.append([json.loads(file.read_text()) for file in files if file.is_file()])
    best = {
        (same[0]["method"], mark): max(same, key=lambda run, mark=mark: run["marks"][mark]["validation"])
        for mark in ("seconds", "tokens")
        for same in runs
        if same
    }
    held = Cache(args.activations / "held-out")
    outputs = {
        (name, mark): torch.load(file_of(args, name, run["times"]).with_suffix(f".{mark}.pt"))
        for (name, mark), run in best.items()
    }
    recovered = losses_recovered(args, held, outputs)
    first = next(iter(best.values()))
    sizes = ", ".join(f"{key} {first[key]}" for key in ("latents", "k", "batch"))
    print(f"{sizes}, one thread, torch {torch.__version__}")
    columns = ("method", "mark", "rate", "tokens", "seconds", "explained", "loss recovered", "L0", "dead")
    columns += ("closed on held-out", "ms per step", "peak GiB")
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for (name, mark), run in best.items():
        row = run["marks"][mark]
        rate = run["times"] * (SIGN_RATE if name == "eai-sparsify" else RATE)
        print(
            f"| {name} | {mark} | {rate:g} | {row['tokens']:,} | {row['seconds']:.0f} | {row['explained']:.3f} | "
            f"{recovered[name, mark]:.3f} | {row['l0']:.1f} | {row['dead']} | {row['closed']:.1%} | "
            f"{run['step_ms']:.0f} | {run['peak_gib']:.2f} |"
        )


def losses_recovered(args: argparse.Namespace, held: Cache, outputs: dict) -> dict:
    """Return of each reconstruction of the held-out rows the share of the model's loss that it recovers."""
    from gatelet_lab.sae import activations, report

    source = activations.load_model(args.model)
    shape = (held.done, held.tokens.shape[1] - SKIPPED, held.width)
    changes = {key: report.in_turn(output.float().view(shape)) for key, output in outputs.items()}
    layer, tokens = held.identity["layer"], held.tokens[: min(held.done, args.contexts)]
    clean, zero, *found = report.losses(source, layer, tokens, held.limit, (None, torch.zeros_like, *changes.values()))
    print(f"layer {layer} of {source.name}: {clean:.3f} nats per token, with zeros {zero:.3f}; {tokens.numel()} tokens")
    return {key: (zero - loss) / (zero - clean) for key, loss in zip(changes, found, strict=True)}


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
    batches = [torch.randn(b, d) for _ in range(args.rounds + 1)]
    if args.activations:
        cache = Cache(args.activations / "training")
        scale = cache.width**0.5 / cache.sample(20_000).norm(dim=1).mean()
        batches = [next(given) * scale for given in [cache.batches(b, seed=0)] for _ in batches]
    x = batches[0]
    names = [name for name in args.methods if available(name)]
    print(f"D = {d}, N = {n}, K = {k}, B = {b}, {args.threads} threads, torch {torch.__version__}")
    methods = {name: METHODS[name](d, n, k) for name in names}
    for method in methods.values():
        start_at(method, x)
    turns = {name: itertools.cycle(batches) for name in names}
    steps = timed({name: lambda m=m, t=turns[name]: m.step(next(t)) for name, m in methods.items()}, args.rounds)
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


def step_in_backward(method: Dense | Ours) -> None:
    """Step each parameter as soon as its gradient is there, and free the gradient: PyTorch's recipe to save memory."""
    for group in method.optimizer.param_groups:
        for parameter in group["params"]:
            own = type(method.optimizer)([{**group, "params": [parameter]}])
            parameter.register_post_accumulate_grad_hook(lambda _, own=own: method.update(own))
    method.optimizer = None


def memory(args: argparse.Namespace) -> None:
    """Print each method's peak of resident memory over some steps, less that of a process that does nothing.

    Twice: as it comes, and with a C library that gives freed blocks back, which counts tensors alone.
    """
    if args.alone:
        d, n, k, b = SHAPES[args.shape]
        torch.set_num_threads(args.threads)
        METHODS[args.alone](64, 2048, 8).step(torch.randn(300, 64))  # imports and compiles what the step needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        x, method = torch.randn(b, d), METHODS[args.alone](d, n, k)
        if args.in_backward:
            step_in_backward(method)
        for _ in range(3):
            method.step(x)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return
    for name, given_back in itertools.product(args.methods, (False, True)):
        command = [sys.executable, __file__, "memory", "--alone", name, "--shape", str(args.shape)]
        command += ["--in-backward"] if args.in_backward else []
        malloc = {"MALLOC_ARENA_MAX": "1"} | ({"MALLOC_MMAP_THRESHOLD_": str(1 << 17)} if given_back else {})
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | malloc)
        told = found.stderr[-300:] if found.returncode else found.stdout.strip().splitlines()[-1] + " MiB"
        print(f"memory {name}{', freed blocks given back' if given_back else ''}: {told}", flush=True)


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
    for option, value in (
        ("--seconds", 120),
        ("--tokens", 400_000),
        ("--latents", 16384),
        ("--k", 32),
        ("--batch", 1024),
    ):
        one.add_argument(option, type=int, default=value)
    one.add_argument("--step-ms", type=float, help="of the one method: count a step as this, not as it took")
    one.add_argument("--alone")
    one.set_defaults(run=train)
    two = commands.add_parser("table")
    two.add_argument("--model", type=Path, required=True)
    two.add_argument("--contexts", type=int, default=32, help="of the held-out ones, for the loss recovered")
    two.set_defaults(run=table)
    for each in (one, two):
        each.add_argument("--activations", type=Path, required=True)
        each.add_argument("--out", type=Path, required=True)
        each.add_argument("--times", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="multiples of the rates")
        each.add_argument(
            "--methods", nargs="+", choices=METHODS, default=[name for name in METHODS if name != "dense"]
        )
    for name, run in (("speed", speed), ("memory", memory)):
        three = commands.add_parser(name)
        three.add_argument(
            "--methods", nargs="+", default=["dense", "top_k", "sae-lens", "eai-sparsify", "eai-sparsify, Adam"]
        )
        for option, value in (("--shape", 0), ("--threads", 2), ("--rounds", 5)):
            three.add_argument(option, type=int, default=value)
        three.add_argument("--activations", type=Path, help="instead of random inputs")
        three.add_argument("--alone")
        three.add_argument("--in-backward", action="store_true", help="of dense and ours: step in the backward pass")
        three.set_defaults(run=run)
    commands.add_parser("format").set_defaults(run=exchange)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
