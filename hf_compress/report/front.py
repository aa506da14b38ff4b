"""The picture of a sweep: what is lost at each size, by layer and with all layers alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from hf_compress.report.plots import BLUE, INK, VERMILION, draw_on, figure_of

Row = tuple[float, float, float, float]
"""Share of the dense model's cost, KL as predicted and as measured, its standard error."""
STYLES = {"by layer": (BLUE, "o"), "uniform": (VERMILION, "s")}


def plot_front(series: Mapping[str, Sequence[Row]], cost: str, path: Path) -> Path:
    """Draw both series: measured KL as marks with two standard errors, predicted KL as a line.

    Args:
        series: by how the widths were chosen.
        cost: what the shares are of.
    """
    figure = figure_of(1.6)
    axes = figure.subplots()
    for name, rows in series.items():
        colour, mark = STYLES[name]
        shares, expected, measured, errors = zip(*sorted(rows), strict=True)
        axes.plot(shares, expected, color=colour, linewidth=1, linestyle="--", alpha=0.7)
        axes.errorbar(
            shares,
            measured,
            yerr=[2 * error for error in errors],
            color=colour,
            marker=mark,
            linestyle="none",
            capsize=2,
            label=f"{name} (dashed: predicted)",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(f"{cost}, share of the dense model's")
    axes.set_ylabel("KL to the dense model (nats per token)")
    axes.legend(frameon=False, loc="upper right")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "What each size loses", fontsize=11, fontweight="bold", color=INK, x=0.01, ha="left"
    )
    return draw_on(figure, path)
