"""The table on the screen, the JSON file and the picture."""

import importlib.util
from itertools import groupby, zip_longest

from rich.console import Console
from rich.table import Table

from harness import DIRECTIONS


def show(title, rows, unit):
    """Prints the table, 80 columns wide. rows: as the JSON file has them."""
    console = Console()
    table = Table(title=f"{title}\n", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("", "contender"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms (20–80 %)", "×\neager", unit, "peak\nMB", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (shape, direction), group in groupby(rows, lambda r: (r["shape"], r["direction"])):
        lines = [(row["contender"], *_cells(row)) for row in group]
        labels = [*shape.split(), direction]
        lines += [()] * (len(labels) - len(lines))
        for label, line in zip_longest(labels, lines, fillvalue=""):
            table.add_row(label, *line)
        table.add_row()
    console.print(table)
    console.print(_caption(rows[0]), highlight=False)
    for row in rows:
        if row["problem"]:
            where = f"{row['shape']} {row['direction']} {row['contender']}"
            console.print(f"not timed, {where}: {row['problem']}", style="red", markup=False)


def _cells(row):
    time_ms, memory = "not timed", row["peak_memory_bytes"]
    rate = row["gflops"] or row["gbytes_per_s"] or row["images_per_s"]
    if row["median_ms"]:
        median, p20, p80 = (_three_digits(row[k]) for k in ("median_ms", "p20_ms", "p80_ms"))
        time_ms = f"{median} ({p20}–{p80})"
    cells = (
        ("{}", time_ms),
        ("{:.2f}", row["speedup_vs_eager"]),
        ("{}", rate and _three_digits(rate)),
        ("{:.1f}", None if memory is None else memory / 1e6),
        ("{:.1e}", row["error"]),
    )
    return ["–" if value is None else form.format(value) for form, value in cells]


def _three_digits(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _caption(row):
    isa = "" if row["device"] == "cuda" else f" ({row['cpu_isa']}, {row['threads']} threads)"
    return (
        f"{row['device_name']}{isa}, {row['dtype']}, torch {row['torch']}, "
        f"refinenet_fast {row['refinenet_fast']}, allocator {row['allocator']}"
    )


def can_plot():
    return importlib.util.find_spec("matplotlib") is not None


# Colours that stay apart for colour-blind readers; PyTorch in grey, ours in colours.
COLOURS = {
    "compile": "#80868b",
    "onnxruntime": "#56b4e9",
    "openvino": "#e69f00",
    "reference": "#c8b6e2",
    "cpu": "#0072b2",
    "triton": "#009e73",
    "cuda": "#d55e00",
}


def plot(path, title, rows):
    """Writes a bar chart of speed relative to eager, a line at 1: a panel for each direction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["speedup_vs_eager"] and row["contender"] != "eager"]
    directions = [d for d in DIRECTIONS if any(row["direction"] == d for row in rows)]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    width = max(4.5, 1.35 * len(shapes))
    figure, axes = plt.subplots(
        1,
        max(len(directions), 1),
        figsize=(width * max(len(directions), 1), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, direction in zip(axes[0], directions):
        _panel(axis, direction, shapes, [r for r in rows if r["direction"] == direction])
    if directions:
        axes[0][0].set_ylabel("speed, PyTorch eager = 1")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=len(labels), loc="outside lower center", frameon=False)
        figure.suptitle(f"{title}\n{_caption(rows[0])}", fontsize=9)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _panel(axis, direction, shapes, rows):
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    speed = {(row["shape"], row["contender"]): row["speedup_vs_eager"] for row in rows}
    bar = 0.84 / max(len(contenders), 1)
    for i, name in enumerate(contenders):
        at = [k + (i - (len(contenders) - 1) / 2) * bar for k in range(len(shapes))]
        heights = [speed.get((shape, name), 0) for shape in shapes]
        bars = axis.bar(at, heights, bar * 0.92, color=COLOURS.get(name, "#cc79a7"), label=name)
        axis.bar_label(bars, [f"{h:.2f}" if h else "" for h in heights], fontsize=7, padding=1)
    axis.axhline(1, color="#202124", linewidth=0.8, zorder=0)
    axis.set_title(direction, fontsize=10)
    axis.set_xticks(range(len(shapes)), [_shape_label(shape) for shape in shapes], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)


def _shape_label(shape):
    """ "8x256x128x128", with a label before it or not, in two lines."""
    label, _, sizes = shape.rpartition(" ")
    batch, channels, height, width = sizes.split("x")
    return f"{height}×{width}\n{label or channels + ' ch'}" + (f", batch {batch}" if batch != "1" else "")
