"""An inspection as one picture (PNG, 1200 pixels wide), in the look of the report's plots."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_compress.inspection.results import Inspection
from hf_compress.inspection.table import finding, percent
from hf_compress.report.plots import BLUE, DPI, GREY, INK, VERMILION, WIDTH_INCHES

BLUES = (BLUE, "#56B4E9", "#C9E4F6")
"""From the smallest error to the largest; the bars stand in front of one another."""


def plot_inspection(inspection: Inspection, path: str | Path) -> Path:
    """Draw an inspection.

    From top to bottom: the share of the neurons that can go at each error; dead neurons and
    near-duplicates; effective ranks, with the layers that have massive activations shaded.

    Returns:
        The PNG file.
    """
    figure = Figure(figsize=(WIDTH_INCHES, 7.0), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(1.5, 0.55, 1.2))
    _draw_removable(top, inspection)
    _draw_dead_and_duplicates(middle, inspection)
    _draw_ranks(bottom, inspection)
    figure.suptitle(
        f"{inspection.model}: {finding(inspection)}",
        fontsize=11,
        fontweight="bold",
        color=INK,
        x=0.01,
        ha="left",
    )
    layers = [layer.layer for layer in inspection.layers]
    bottom.set_xlabel(
        f"layer (0 is nearest the input); read on {inspection.num_tokens:,} tokens of "
        f"{inspection.text}"
    )
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    bottom.set_xlim(min(layers) - 0.7, max(layers) + 0.7)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path = Path(path)
    figure.savefig(path, format="png", dpi=DPI)
    return path


def _draw_removable(axes: Axes, inspection: Inspection) -> None:
    layers = [layer.layer for layer in inspection.layers]
    levels = inspection.error_levels
    # The highest bars first, so that none is hidden.
    for level, colour in reversed(list(zip(levels, BLUES, strict=True))):
        shares = [layer.removable_share(level) for layer in inspection.layers]
        whole = percent(inspection.removable_share(level))
        axes.bar(
            layers, shares, width=0.8, color=colour, label=f"at {percent(level)} error: {whole}"
        )
    axes.set_ylabel("MLP neurons that can go\n(folded into the rest)")
    _percent_axis(axes, max(layer.removable_share(levels[-1]) for layer in inspection.layers))
    _legend(axes, step=-1)


def _draw_dead_and_duplicates(axes: Axes, inspection: Inspection) -> None:
    layers = [layer.layer for layer in inspection.layers]
    dead = [len(layer.dead_neurons) for layer in inspection.layers]
    duplicates = [layer.num_duplicates for layer in inspection.layers]
    names = (
        f"dead: {sum(dead):,}",
        f"near-duplicates: {sum(duplicates):,}, of {inspection.num_neurons:,} neurons",
    )
    axes.bar(layers, dead, width=0.8, color=VERMILION, label=names[0])
    axes.bar(layers, duplicates, width=0.8, bottom=dead, color=BLUES[1], label=names[1])
    axes.set_ylabel("dead or\nduplicate")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    most = max(a + b for a, b in zip(dead, duplicates, strict=True))
    axes.set_ylim(0, max(1, most) * 1.08)
    _legend(axes)
    if not most:
        middle = axes.transAxes
        axes.text(0.5, 0.5, "none in any layer", color=INK, ha="center", transform=middle)


def _draw_ranks(axes: Axes, inspection: Inspection) -> None:
    layers = [layer.layer for layer in inspection.layers]
    size = 7 if len(layers) <= 40 else 4.5
    massive = inspection.massive_layers
    worst = max((each.massive_activations.max_to_median for each in massive), default=0.0)
    for number, layer in enumerate(massive):
        label = None if number else f"massive activations: up to {worst:,.0f} x median"
        axes.axvspan(layer.layer - 0.5, layer.layer + 0.5, color=GREY, alpha=0.6, lw=0, label=label)
    highest = 0.0
    for name, ranks, marker, colour in (
        ("MLP", [layer.mlp_effective_rank for layer in inspection.layers], "o", BLUE),
        ("attention", [at.attention_effective_rank for at in inspection.layers], "s", VERMILION),
    ):
        shares = [rank / inspection.hidden_size for rank in ranks]
        highest = max(highest, *shares)
        label = f"{name}: mean {percent(sum(shares) / len(shares))}"
        axes.plot(layers, shares, marker, color=colour, ms=size * 0.9, label=label, clip_on=False)
    axes.set_ylabel(f"effective output rank\n(of {inspection.hidden_size:,} dimensions)")
    axes.grid(axis="y", color="#EEEEEE")
    axes.set_axisbelow(True)
    _percent_axis(axes, highest)
    _legend(axes)


def _percent_axis(axes: Axes, highest: float) -> None:
    axes.set_ylim(0, min(1.02, 1.12 * highest) or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _legend(axes: Axes, step: int = 1) -> None:
    """The legend, above the axes, where it can hide nothing; with a step of -1, turned round."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::step],
        labels[::step],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=3,
        frameon=False,
        borderpad=0,
    )
