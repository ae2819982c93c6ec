"""A byte-level GPT on the sources of Python's standard library: dense, narrow, conditional, mixture of experts.

All models see the same bytes in the same order. Bits per byte are of held-out files, gates calibrated. Times are
medians of single steps, the models taking turns, measured at the end; training time is steps times that.

    python examples/byte_gpt.py [--steps 1000] [--dir runs/byte_gpt] [--only train]

Called again, it continues where it stopped. Prints a table in Markdown; ``table.json`` and, where matplotlib is
installed, ``curves.png`` go to the folder.
"""

import argparse
import json
import math
import os
import random
import statistics
import sysconfig
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import gatelet

WIDTH, LAYERS, HEADS, HIDDEN, CONTEXT, BATCH = 128, 4, 4, 1024, 128, 8
RATE, BOTTLENECK, GROUP, EXPERTS = 0.25, 32, 8, 16
ACTIVE = int(HIDDEN * RATE)
ESTIMATORS = ("straight_through", "straight_through_open", "noisy_rectifier")


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes to train on and held-out ones, of other files, none of which equals a training file."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")) if "site-packages" not in p.parts]
    random.Random(0).shuffle(files)
    data = list(dict.fromkeys(p.read_bytes() for p in files))  # a file that occurs twice counts once
    parts = b"".join(data[20:]), b"".join(data[:20])
    train, held = (torch.frombuffer(bytearray(each), dtype=torch.uint8).long() for each in parts)
    return train, held


class Experts(nn.Module):
    """Top-k mixture of experts: as many hidden units active per token as the conditional layer has."""

    def __init__(self, count: int = EXPERTS) -> None:
        super().__init__()
        size = HIDDEN // count
        self.top = ACTIVE // size
        self.router = nn.Linear(WIDTH, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, size), nn.GELU(), nn.Linear(size, WIDTH)) for _ in range(count)
        )
        self.balance = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        share = self.router(flat).softmax(-1)
        weight, index = share.topk(self.top, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (index == number).nonzero(as_tuple=True)
            if len(token):
                out.index_add_(0, token, expert(flat[token]) * weight[token, place, None])
        used = F.one_hot(index, len(self.experts)).float().mean((0, 1))
        self.balance = len(self.experts) * (used * share.mean(0)).sum()  # the usual auxiliary loss, 1 when balanced
        return out.view(x.shape)


class Block(nn.Module):
    """Attention and a feed-forward layer, norms first."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out, self.ffn = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), ffn

    def forward(self, x: torch.Tensor, past: list | None = None) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        if past is not None:
            if past:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            past[:] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))


class GPT(nn.Module):
    """Bytes to logits of the next byte."""

    def __init__(self, make_ffn) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(make_ffn()) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, ids: torch.Tensor, past: list | None = None) -> torch.Tensor:
        start = past[0][0].shape[2] if past and past[0] else 0
        x = self.byte(ids) + self.place.weight[start : start + ids.shape[1]]
        for number, block in enumerate(self.blocks):
            x = block(x, None if past is None else past[number])
        return self.head(self.norm(x))


def dense(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))


def conditional(estimator: str) -> nn.Module:
    return gatelet.nn.ConditionalFFN(WIDTH, HIDDEN, BOTTLENECK, estimator=estimator, target_rate=RATE, group_size=GROUP)


MODELS = {
    f"dense {HIDDEN}": lambda: dense(HIDDEN),
    f"dense {ACTIVE}": lambda: dense(ACTIVE),
    **{f"conditional, {each}": lambda each=each: conditional(each) for each in ESTIMATORS},
    f"mixture, top {ACTIVE * EXPERTS // HIDDEN} of {EXPERTS}": Experts,
}


def ffn_flops(model: GPT) -> float:
    """FLOPs per token of the feed-forward layers, gater or router included, with what is open."""
    first = model.blocks[0].ffn
    if isinstance(first, gatelet.nn.ConditionalFFN):
        return sum(row.flops_active + row.flops_gater for row in gatelet.report(model).layers)
    if isinstance(first, Experts):
        return LAYERS * (4 * WIDTH * ACTIVE + 2 * WIDTH * EXPERTS)
    return LAYERS * 4 * WIDTH * first[0].out_features


def batch(data: torch.Tensor, step: int, size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(len(data) - CONTEXT - 1, (size,), generator=torch.Generator().manual_seed(step))
    pieces = torch.stack([data[s : s + CONTEXT + 1] for s in starts])
    return pieces[:, :-1], pieces[:, 1:]


def train_step(model: GPT, optimizer: torch.optim.Optimizer, data: torch.Tensor, step: int) -> None:
    x, y = batch(data, step)
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    if any(isinstance(module, gatelet.nn.ConditionalFFN) for module in model.modules()):
        loss = loss + 0.1 * gatelet.sparsity.penalty(model)
    loss = loss + 0.01 * sum(module.balance for module in model.modules() if isinstance(module, Experts))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def open_share(model: GPT) -> float | None:
    """Return the share of open gates in the last forward pass, over the layers."""
    shares = [float(m.active_fraction) for m in model.modules() if isinstance(m, gatelet.nn.ConditionalFFN)]
    return statistics.mean(shares) if shares else None


def bits_per_byte(model: GPT, train: torch.Tensor, held: torch.Tensor) -> float:
    if any(isinstance(module, gatelet.nn.ConditionalFFN) for module in model.modules()):
        gatelet.sparsity.calibrate_thresholds(model, [batch(train, -1 - i)[0] for i in range(4)])
    model.eval()
    losses = []
    with torch.no_grad():
        for number in range(12):
            x, y = batch(held, number, 16)
            losses.append(F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item())
    model.train()
    return statistics.mean(losses) / math.log(2)


def train(name: str, make, steps: int, folder: Path, data: tuple[torch.Tensor, torch.Tensor]) -> dict:
    """Train one model, from its checkpoint if there is one; return its curve and model."""
    file = folder / (name.replace(" ", "_").replace(",", "") + ".pt")
    torch.manual_seed(0)
    model = GPT(make)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    at, curve, every = 0, [], max(1, steps // 4)
    if file.exists():
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        at, curve = saved["step"], saved["curve"]
        torch.set_rng_state(saved["random"])
    while at < steps:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (at + 1) / 50) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * at / steps)))
        train_step(model, optimizer, data[0], at)
        at += 1
        if at % every == 0 or at == steps:
            if not curve or curve[-1][0] != at:
                sampled = open_share(model)  # of the training step, gates drawn
                curve.append((at, bits_per_byte(model, *data), sampled))
                share = "" if sampled is None else f", {sampled:.1%} open in training"
                print(f"{name}: step {at}, {curve[-1][1]:.3f} bits per byte{share}", flush=True)
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": at, "curve": curve}
            torch.save(saved | {"random": torch.get_rng_state()}, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
    return {"model": model, "optimizer": optimizer, "curve": curve}


def decode(model: GPT, ids: torch.Tensor) -> None:
    """Give the model bytes one at a time, with the attention's past kept."""
    past: list[list] = [[] for _ in range(LAYERS)]
    with torch.no_grad():
        for position in range(ids.shape[1]):
            model(ids[:, position : position + 1], past)


def medians(ways: dict, seconds: float) -> dict[str, float]:
    """Return each way's median time, in turns, in random order."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order, begin = list(ways), time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times[order[0]]) < 6:
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--dir", type=Path, default=Path("runs/byte_gpt"))
    options.add_argument("--only", choices=("train",))
    options.add_argument("--seconds", type=float, default=20.0, help="of measuring, per kind of measurement")
    given = options.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    data = text()
    done = {name: train(name, make, given.steps, given.dir, data) for name, make in MODELS.items()}
    if given.only == "train":
        return
    opened, held_open = {}, {}
    for name, each in done.items():
        each["model"].eval()
        with torch.no_grad():
            each["model"](batch(data[1], 0, 64)[0])
        opened[name], held_open[name] = ffn_flops(each["model"]), open_share(each["model"])
    ids = batch(data[1], 0, 1)[0]
    decoding = medians({name: lambda m=each["model"]: decode(m, ids) for name, each in done.items()}, given.seconds)
    steps = {}
    for name, each in done.items():
        each["model"].train()
        steps[name] = lambda each=each: train_step(each["model"], each["optimizer"], data[0], 0)
    stepping = medians(steps, given.seconds)
    print(f"\n{torch.get_num_threads()} threads; {len(data[0]) / 1e6:.1f} MB of text, {BATCH * CONTEXT} bytes a step")
    half = given.steps // 2
    print(f"\n| model | bits per byte, {half} steps | {given.steps} steps | open, training | open, held-out ", end="")
    print("| FFN kFLOPs per token | ms per step | training s | decode tokens/s |\n|---|" + "---|" * 8)
    rows = {}
    for name, each in done.items():
        curve, step, speed = each["curve"], stepping[name], CONTEXT / decoding[name]
        middle = min(curve, key=lambda point: abs(point[0] - half))[1]
        shares = " | ".join("" if it is None else f"{it:.1%}" for it in (curve[-1][2], held_open[name]))
        print(f"| {name} | {middle:.3f} | {curve[-1][1]:.3f} | {shares} | {opened[name] / 1e3:.0f} ", end="")
        print(f"| {1e3 * step:.0f} | {given.steps * step:.0f} | {speed:.0f} |")
        rows[name] = {"curve": curve, "open": held_open[name], "ffn_flops": opened[name], "step_s": step}
        rows[name]["decode_tokens_per_s"] = speed
    about = {"steps": given.steps, "threads": torch.get_num_threads(), "torch": torch.__version__}
    (given.dir / "table.json").write_text(json.dumps(about | {"models": rows}, indent=1))
    plot(rows, given.dir / "curves.png")


def plot(rows: dict[str, dict], file: Path) -> None:
    """Draw bits per byte against training time and, at the end, against active FLOPs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    time_axis, flops_axis = figure.subplots(1, 2, sharey=True)
    for name, row in rows.items():
        steps, bits, _ = zip(*row["curve"], strict=True)
        time_axis.plot([step * row["step_s"] for step in steps[1:]], bits[1:], label=name)
        flops_axis.plot(row["ffn_flops"] / 1e3, bits[-1], "o", label=name)
    time_axis.set(xlabel="training time, s", ylabel="bits per byte, held-out files")
    flops_axis.set(xlabel="kFLOPs per token in the feed-forward layers", xlim=(0, None))
    flops_axis.legend(fontsize=8)  # where six points leave room
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
