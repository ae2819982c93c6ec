"""The pictures of the commands that train: learning curves (Figure 2, left), gates by class, frontiers, ELBOs."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gatelet_lab.files import write_atomically

STOCHASTIC = ("noisy_rectifier", "straight_through", "smooth_times_stochastic", "score_function")
SHOWN_GATES = 120


def curves(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot validation error against epochs; the four stochastic methods of Figure 2 solid, the baselines dashed."""
    plt, mpl = _matplotlib()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = dict.fromkeys(each["row"] for each in results)
    colours = dict(zip(rows, plt.get_cmap("tab10").colors, strict=False))
    for row in rows:
        for index, result in enumerate(each for each in results if each["row"] == row):
            history = result["history"]
            axes.plot(
                [epoch["epoch"] + 1 for epoch in history],
                [epoch["valid_error"] for epoch in history],
                color=colours[row],
                linestyle="-" if row in STOCHASTIC else "--",
                linewidth=1.8 if row in STOCHASTIC else 1.1,
                marker="." if len(history) < 20 else None,
                label=result["config"]["title"] if index == 0 else None,
            )
    axes.set(xlabel="epoch", ylabel="validation error (%)", yscale="log", title="Learning curves (Figure 2, left)")
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    _save(figure, path)


def save_gates(counts: Tensor, path: Path) -> None:
    """Keep how often each gate is open for each class, (classes, N)."""
    write_atomically(path, lambda file: np.save(file, counts.numpy().astype(np.float16)))


def gates(results: Sequence[dict[str, Any]], out: Path, path: Path) -> None:
    """Plot, per sparse row, how often its most class-dependent gates are open for each class."""
    files = {each["row"]: out / "rows" / f"{each['row']}-seed0.gates.npy" for each in results}
    titles = {each["row"]: each["config"]["title"] for each in results}
    shown = {row: file for row, file in files.items() if file.is_file()}
    if not shown:
        return
    plt, _ = _matplotlib()
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(9, max(3.2, 0.6 + 1.7 * len(shown))), layout="constrained", squeeze=False
    )
    for axes, (row, file) in zip(panels[:, 0], shown.items(), strict=True):
        with file.open("rb") as opened:
            counts = np.load(opened).astype(np.float32)
        selective = np.argsort(-counts.var(axis=0))[:SHOWN_GATES]
        selective = selective[np.argsort(counts[:, selective].argmax(axis=0), kind="stable")]
        image = axes.imshow(counts[:, selective], aspect="auto", vmin=0, vmax=1, cmap="magma", interpolation="nearest")
        axes.set(ylabel="class", yticks=range(0, len(counts), max(1, len(counts) // 5)), xticks=[])
        axes.set_title(titles[row], fontsize=9)
    panels[-1, 0].set_xlabel(f"the {SHOWN_GATES} gates that differ most between classes, sorted by their class")
    figure.colorbar(image, ax=panels[:, 0].tolist(), label="share of images with the gate open", aspect=10 * len(shown))
    _save(figure, path)


def _matplotlib() -> tuple[Any, Any]:
    """Import matplotlib when a picture is drawn: the worker processes, which draw none, start faster without."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt, mpl


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))
    _matplotlib()[0].close(figure)


def probabilities(histograms: Mapping[str, Sequence[float]], path: Path) -> None:
    """Plot histograms of the gates' firing probabilities, on a logarithmic axis of shares."""
    plt, _ = _matplotlib()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, shares in histograms.items():
        axes.stairs(shares, np.linspace(0, 1, len(shares) + 1), label=name)
    axes.axvline(0.1, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="probability that a gate fires (validation images)", ylabel="share of gates", yscale="log")
    axes.legend(fontsize=8)
    _save(figure, path)


def variance(points: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot the variance of a gradient against the epoch, a line per baseline."""
    plt, _ = _matplotlib()
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in points[0]:
        if name != "epoch":
            axes.plot(
                [each["epoch"] for each in points],
                [each[name] for each in points],
                marker="o",
                label=f"baseline: {name}",
            )
    axes.set(xlabel="epoch", ylabel="variance of the logits' gradient", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    _save(figure, path)


def frontier(points: Sequence[Mapping[str, Any]], times: Mapping[str, Any], path: Path) -> None:
    """Plot test error against all multiply-adds, and, where it was measured, against the time; a line per method."""
    plt, mpl = _matplotlib()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    taken = times.get("milliseconds", {})
    costs = {
        panels[0]: {each["point"]: each["multiply_adds"] / 1e3 for each in points},
        panels[1]: {name: each / taken["reference"] for name, each in taken.items()},
    }
    for axes, cost in costs.items():
        for method in dict.fromkeys(each["method"] for each in points):
            own = [each for each in points if each["method"] == method and each["point"] in cost]
            line = sorted((cost[each["point"]], each["test_error"]) for each in own)
            dense = {"color": "black", "linestyle": "--"} if method == "narrow" else {}
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=method, **dense) if line else None
        axes.set(xscale="log", yscale="log")
        axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        axes.grid(alpha=0.3, which="both")
    panels[0].set(xlabel="thousand multiply-adds per image, gater included", ylabel="test error (%)")
    panels[1].set(xlabel="time, over a dense ReLU network's of the same width" if taken else "time: not measured yet")
    panels[0].yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    for axis in (panels[0].yaxis, panels[1].xaxis):  # these span about a decade: their ticks are minor ones
        axis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%g"))
    panels[0].legend(fontsize=8)
    _save(figure, path)


def vae(results: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Plot validation ELBO and gradient variance against steps; the mean over seeds."""
    plt, _ = _matplotlib()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    specs = list(dict.fromkeys(result["estimator"] for result in results))
    for index, spec in enumerate(specs):
        histories = [result["history"] for result in results if result["estimator"] == spec]
        style = {"color": plt.get_cmap("tab20" if len(specs) > 10 else "tab10")(index), "marker": ".", "label": spec}
        # The first evaluation is of the untrained model in every run; it would only stretch the axis.
        rows = [[row for row in history if row["step"] > 0] for history in histories]
        steps = [row["step"] for row in rows[0]]
        for axes, key in ((left, "valid_elbo"), (right, "variance")):
            values = [statistics.fmean(history[i][key] for history in rows) for i in range(len(steps))]
            axes.plot(steps, values, **style)
    left.set(xlabel="step", ylabel="validation ELBO (nats per image)")
    right.set(xlabel="step", ylabel="variance of the gradient per logit")
    if all(row["variance"] > 0 for result in results for row in result["history"]):
        right.set_yscale("log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)
