"""The table and the picture of ``language_model.py``."""

import statistics

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt


def summaries(rows, found):
    """Name -> medians over the visits and perplexity, of the rows that have both."""
    keys = ("ms 1", "ms 2", "ffn")
    return {
        name: {key: statistics.median(visit[key] for visit in found[name]["visits"]) for key in keys}
        | {"perplexity": found[name]["perplexity"]}
        for name in rows
        if {"visits", "perplexity"} <= found.get(name, {}).keys()
    }


DENSE = {"float32": "dense, float32", "bf16": "dense, bf16", "int8": "dense, int8, quantize_dynamic"}
"""The rival of each precision."""
PARTS_OF_TABLE = {
    "No gates": lambda line: line is None,
    "Weights untouched": lambda line: line is not None and not line.learns,
    "Weights distilled": lambda line: line is not None and line.learns,
}


def show(rows, measured, out):
    """Print the table, and how far a row's turns lie apart; draw the picture. Both are written to ``out``.

    Args:
        rows: name -> row, in the table's order.
        measured: name -> the row's visits and its perplexity.
        out: a folder.
    """
    found = summaries(rows, measured)
    if DENSE["float32"] not in found:
        print("no table: it compares with 'dense, float32', of which speed and perplexity are wanted")
        return
    base, lines = found[DENSE["float32"]]["perplexity"], []
    for title, belongs in PARTS_OF_TABLE.items():
        head = ["tokens/s, {}", "times dense", "times all open"]
        both = [word.format(threads) for threads in ("1 thread", "2 threads") for word in head]
        head = [title, *both, "FFN ms, 1 thread", "perplexity"]
        lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [row_of_table(name, rows[name], found, base) for name in found if belongs(rows[name].line)]
    lines += ["", spread_of_turns(found, measured)]
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines[1:]) + "\n")
    draw(rows, found, base, out / "language-model.png")


def row_of_table(name, row, found, base):
    cells, it = [name], found[name]
    for each in ("ms 1", "ms 2"):
        cells.append(f"{1e3 / it[each]:.1f}")
        for rival in (DENSE[row.weights], f"all units open, {row.weights}"):
            says = rival in found and not (rival.startswith("all") and (name == rival or name.startswith("dense")))
            cells.append(f"{found[rival][each] / it[each]:.2f}" if says else "–")
    return f"| {' | '.join(cells)} | {it['ffn']:.1f} | {_quality(it['perplexity'], base)} |"


def _quality(value, base):
    return f"{value:.2f} ({value / base - 1:+.1%})" if value < 10 * base else f"{value:,.0f}"


def spread_of_turns(found, measured):
    """In words: how far the turns of a row lie apart, and those of ``dense, float32``."""
    turns = {name: [1e3 / visit["ms 1"] for visit in measured[name]["visits"]] for name in found}
    apart = sorted(max(each) / min(each) - 1 for each in turns.values())
    dense = ", ".join(f"{speed:.1f}" for speed in turns[DENSE["float32"]])
    return (
        f"One thread: the turns of a row lie {apart[len(apart) // 2]:.1%} apart (median), at most {apart[-1]:.1%}; "
        f"those of {DENSE['float32']}: {dense} tokens/s."
    )


LOOKS = {
    "dense": ("s", "0.4"),
    "all units open": ("D", "black"),
    "TEAL": ("P", "tab:green"),
    "preview": ("o", "tab:blue"),
    "self": ("v", "tab:orange"),
    "network": ("^", "tab:purple"),
    "pruned": ("X", "tab:red"),
}
"""Marker and colour in the picture, by how a row's name begins."""
EDGE = 500
"""Rows whose perplexity is higher by more percent stand at the picture's edge."""


def draw(rows, found, base, path):
    """Draw a panel for each precision: perplexity over tokens per second on one thread, every row a point."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 7), sharey=True, width_ratios=(1.7, 1, 1), layout="constrained")
    for weights, axes in zip(DENSE, panels, strict=True):
        here = {name: (1e3 / it["ms 1"], 100 * (it["perplexity"] / base - 1))
                for name, it in found.items() if rows[name].weights == weights}  # fmt: skip
        draw_points(axes, here, rows)
        axes.axhline(5, color="0.7", linewidth=0.8, linestyle="--", label="+5 %")
        if DENSE[weights] in here:
            speed = 1.3 * here[DENSE[weights]][0]
            axes.axvline(speed, color="0.7", linewidth=0.8, linestyle=":", label="1.3 times dense")
        axes.set_yscale("symlog", linthresh=10, linscale=1.8)
        axes.set(title=weights, xlabel="tokens per second, one thread", ylim=(-3, 1.1 * EDGE))
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    beyond = sorted((it["ms 1"], name) for name, it in found.items() if it["perplexity"] > (1 + EDGE / 100) * base)
    listed = [f"{name}: {found[name]['perplexity']:,.0f}" for _, name in reversed(beyond)]
    words = "\n".join(["Perplexities at the edge, from left to right:", *listed]) if listed else ""
    panels[0].text(0.02, 0.98, words, fontsize=7, va="top", transform=panels[0].transAxes)
    panels[0].set_yticks([0, 2, 5, 10, 20, 50, 100, 200, 500])
    panels[0].yaxis.set_major_formatter("+{x:.0f} %")
    panels[0].set_ylabel("perplexity, held out, beside dense float32")
    labels = {label: each for axes in panels for each, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(name, rows):
    """What the picture says of a row, beside colour and panel: of a line its rate, without the percent sign."""
    short = name.removesuffix(f", {rows[name].weights}").removesuffix(" of inputs")
    short = short.removeprefix("dense, ").removeprefix("int8, ").removeprefix("float32, ")
    if rows[name].line is None or rows[name].line.gater not in ("preview", "self"):
        return short
    short = short.split(", ", 1)[1].replace("% open", "").replace(", distilled", "")
    return short.replace("attention by 75%", "attention too")


def matrix(rows, gater, learns):
    """The rows of a gater that differ in the rate only, in each precision."""
    mine = [
        name
        for name, row in rows.items()
        if row.line and (row.line.gater, row.line.learns) == (gater, learns)
        if not (row.line.by_block or row.line.relu or row.attention)
    ]
    return sorted(mine, key=lambda name: rows[name].line.rate)


def draw_points(axes, points, rows):
    """Draw a panel's rows; lines join those that differ in the rate only."""
    for name, (speed, worse) in points.items():
        kind = next(kind for kind in LOOKS if name.startswith(kind))
        (marker, colour), line = LOOKS[kind], rows[name].line
        learns = line is not None and line.learns
        axes.plot(speed, min(worse, EDGE), marker, color=colour, markersize=5, clip_on=False,
                  fillstyle="full" if learns else "none", label=kind + ", distilled" * learns)  # fmt: skip
        left = kind in ("preview", "self") and not learns
        side = {"xytext": (-5, 4), "ha": "right"} if left else {"xytext": (5, -8), "ha": "left"}
        if worse < EDGE:
            axes.annotate(_label(name, rows), (speed, worse), fontsize=7, color=colour, textcoords="offset points",
                          **side)  # fmt: skip
    for gater in ("preview", "self"):
        for learns in (False, True):
            joined = [points[name] for name in matrix(rows, gater, learns) if name in points]
            axes.plot(*zip(*joined, strict=True) if joined else ((), ()), "-" if learns else "--",
                      color=LOOKS[gater][1], linewidth=0.8)  # fmt: skip
