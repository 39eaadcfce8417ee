"""The results as pictures, for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .claims import NOISE, copy_share, over_bare_network, speed_up
from .rows import Results, Row

# The palette of Okabe & Ito (2008), which colour-blind readers can tell apart.
STYLES = {
    "native": ("ddpm_fast", "#D55E00"),
    "textbook": ("eager, as textbooks write it", "#0072B2"),
    "in_place": ("eager, in place", "#56B4E9"),
    "compiled": ("torch.compile", "#009E73"),
    "compiled_after_randn": ("torch.randn, then torch.compile", "#7FC8B4"),
    "native_after_lerp": ("torch.lerp, then ddpm_fast", "#F0A36B"),
    "diffusers": ("diffusers", "#CC79A7"),
    "lucidrains": ("lucidrains", "#E69F00"),
    "reference": ("ddpm_fast, pure-PyTorch fallback", "#999999"),
    "randn": ("the noise alone: torch.randn", "#000000"),
    "add": ("the memory alone: torch.add", "#000000"),
}
FLOOR_LINES = {"randn": "--", "add": ":"}

plt.rcParams.update(
    {
        "figure.dpi": 160,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": "#DDDDDD",
        "legend.frameon": False,
    }
)


def draw(results: Results, folder: Path) -> list[Path]:
    """Every plot for which there are rows, each a PNG named after it and the device."""
    paths = []
    for plot in (time_against_size, speed_up_bars, bandwidth_bars, loop_bars):
        figure = plot(results)
        if figure is not None:
            path = folder / f"{plot.__name__.replace('_', '-')}-{results.device}.png"
            figure.savefig(path, metadata={"Software": None})
            plt.close(figure)
            paths.append(path)
    return paths


def time_against_size(results: Results) -> Figure | None:
    """Time per element of a reverse step with noise, over the number of elements."""
    found = {name: results.find(**NOISE, contender=name) for name in STYLES}
    if len(found["native"]) < 3:
        return None  # a line between two points would tell what nobody measured
    figure, axes = plt.subplots(figsize=(8, 4.6))
    for name, rows in found.items():
        if not rows:
            continue
        label, colour = STYLES[name]
        axes.plot(
            [row["elements"] for row in rows],
            [row["ns_per_element"] for row in rows],
            FLOOR_LINES.get(name, "-"),
            label=label,
            color=colour,
            marker="" if name in FLOOR_LINES else "o",
            markersize=5,
            linewidth=2.6 if name == "native" else 1.5,
            zorder=3 if name == "native" else 2,
        )
    axes.set(xscale="log", yscale="log", xlabel="elements of x_t")
    axes.set_ylabel("nanoseconds per element")
    axes.grid(which="major")
    _title(axes, "One reverse step with noise, float32", results)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def speed_up_bars(results: Results) -> Figure | None:
    """How many times faster the native step is than each contender, at each size."""
    rows = results.find(**NOISE, contender=lambda name: name in STYLES and name != "native")
    rows = [row for row in rows if row["contender"] not in (*FLOOR_LINES, "reference")]
    groups = _grouped(rows, lambda row: f"{row['elements']:,} elements")
    return _bars(results, groups, speed_up, "A reverse step: how many times faster ddpm_fast is")


def bandwidth_bars(results: Results) -> Figure | None:
    """The least bytes that a step moves over its time, as a share of the copy bandwidth."""
    kinds = {"noise": "with noise", "no_noise": "without noise", "guided": "guided, with noise"}
    rows = results.find(
        op="reverse_step", dtype="float32", contender=lambda name: name not in FLOOR_LINES
    )
    rows = [row for row in rows if "copy_share" in row and row["contender"] in STYLES]
    largest: list[Row] = []
    for kind in kinds:
        sizes = {row["elements"] for row in rows if row["kind"] == kind}
        largest += [row for row in rows if row["kind"] == kind and row["elements"] == max(sizes)]
    groups = _grouped(largest, lambda row: f"{kinds[row['kind']]}, {row['elements']:,} elements")
    title = "A reverse step's share of the copy bandwidth"
    return _bars(results, groups, copy_share, title, as_share=True)


def loop_bars(results: Results) -> Figure | None:
    """The time of a whole chain over that of its network alone."""
    rows = results.find(op="loop")
    groups = _grouped(
        rows,
        lambda row: (
            f"{row['network'].replace('_', ' ')}, "
            f"batch {row['batch']}, {row['resolution']}×{row['resolution']}"
        ),
    )
    title = "Sampling time, over that of the network alone"
    return _bars(results, groups, over_bare_network, title)


def _grouped(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(name(row), []).append(row)
    return groups


def _bars(
    results: Results,
    groups: dict[str, list[Row]],
    measure: Callable[[Row], float],
    title: str,
    as_share: bool = False,
) -> Figure | None:
    """Horizontal bars in groups, with a line at 1."""
    if not groups:
        return None
    count = sum(len(rows) + 1 for rows in groups.values())
    figure, axes = plt.subplots(figsize=(8, 1.1 + 0.24 * count))
    position, names = 0.0, []
    for group, rows in groups.items():
        _label(axes, group, 0, position, weight="bold")
        position += 1
        for row in sorted(rows, key=measure):
            label, colour = STYLES[row["contender"]]
            value = measure(row)
            axes.barh(position, value, height=0.8, color=colour)
            _label(axes, f"{value:.1%}" if as_share else _times(value), value, position)
            names.append((position, label))
            position += 1
        position += 0.4
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.set_yticks([at for at, _ in names], [label for _, label in names])
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    if as_share:
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(position - 0.4, -0.8)
    axes.grid(axis="x")
    _title(axes, title, results)
    return figure


def _times(value: float) -> str:
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def _label(axes: Axes, text: str, x: float, y: float, weight: str = "normal") -> None:
    """A text to the right of a point, on white so that no line runs through it."""
    axes.annotate(
        text,
        (x, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        weight=weight,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def _title(axes: Axes, title: str, results: Results) -> None:
    axes.set_title(f"{title}\n", loc="left")
    machine = f"{results.machine}; torch {results.versions['torch']}"
    axes.text(0, 1.02, machine, transform=axes.transAxes, color="#555555")
