"""Two plots for the model card, as PNG files of 1200 pixels width.

They use matplotlib's objects and never pyplot: no global state, no display needed.
Colours are Okabe and Ito's, which differ for every kind of colour vision; shapes differ too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hf_compress.report.metrics import LayerMetrics, Metrics

BLUE, VERMILION, GREY, INK = "#0072B2", "#D55E00", "#D9D9D9", "#333333"
DPI, WIDTH_INCHES = 150, 8.0
# Above this range the small values of a linear axis can no longer be read.
LOG_RANGE = 20


class _Errors(NamedTuple):
    """Errors of one part of the block, for the layers in which something was removed."""

    name: str
    layers: list[int]
    kept: list[float]
    dropped: list[float | None]

    @property
    def saved_share(self) -> float | None:
        """Median over layers of the share of the error that folding saves."""
        pairs = [
            (now, was) for now, was in zip(self.kept, self.dropped, strict=True) if was is not None
        ]
        shares = [1 - now / was for now, was in pairs if was > 0]
        return median(shares) if shares else None


def plot_widths(metrics: Metrics, path: str | Path) -> Path | None:
    """Draw what every layer kept of its MLP neurons or experts and KV groups, and of the query
    heads of these where some are gone.

    Returns:
        The PNG file, or None where the metrics have no layers to draw.
    """
    if not metrics.layers:
        return None
    layers = [layer.layer for layer in metrics.layers]
    parts = _widths(metrics.layers)
    figure = figure_of(len(parts))
    grid = figure.subplots(len(parts), 1, sharex=True)
    for axes, (name, widths) in zip(grid, parts.items(), strict=True):
        _draw_widths(axes, layers, widths, name)
    kept = [f"{_kept(widths)} of the {name}" for name, widths in parts.items()]
    left = sum(not layer.is_dropped for layer in metrics.layers)
    if left < len(layers):
        kept.insert(0, f"{left} of {len(layers)} layers")
    _finish(figure, grid[-1], f"Kept: {', '.join(kept)}", layers)
    return draw_on(figure, path)


def mlp_widths(layers: Sequence[LayerMetrics]) -> tuple[str, list[tuple[int, int]]]:
    """What to call the units of the MLPs, and how many of each layer's are kept, of how many."""
    if any(at.num_experts_before for at in layers):
        return "experts", [(at.num_experts or 0, at.num_experts_before or 0) for at in layers]
    return "MLP neurons", [(at.intermediate_size, at.intermediate_size_before) for at in layers]


def plot_errors(metrics: Metrics, path: str | Path) -> Path | None:
    """Draw the relative output error that pruning made in every layer.

    Where it is known, the error without folding stands above it: the bar between the two
    is what folding saves.

    Returns:
        The PNG file, or None where no layer has an error.
    """
    parts = [part for part in _errors(metrics.layers) if part.layers]
    if not parts:
        return None
    figure = figure_of(len(parts))
    grid = figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, part in zip(grid, parts, strict=True):
        _draw_errors(axes, part)
    _finish(figure, grid[-1], _errors_title(parts), [layer.layer for layer in metrics.layers])
    return draw_on(figure, path)


def _widths(layers: Sequence[LayerMetrics]) -> dict[str, list[tuple[int, int]]]:
    """By the name of a part, how many of it each layer kept and had."""
    unit, mlp = mlp_widths(layers)
    parts = {unit: mlp}
    if any(at.num_experts and at.intermediate_size < at.intermediate_size_before for at in layers):
        # A layer without experts has none to lose them.
        parts["neurons of each expert"] = [
            (at.intermediate_size, at.intermediate_size_before) if at.num_experts_before else (0, 0)
            for at in layers
        ]
    parts |= {
        "KV groups": [(at.num_key_value_heads, at.num_key_value_heads_before) for at in layers],
    }
    if any(at.heads_per_group not in (at.heads_per_group_before, 0) for at in layers):
        parts["query heads"] = [
            (
                at.num_key_value_heads * (at.heads_per_group or 0),
                at.num_key_value_heads_before * (at.heads_per_group_before or 0),
            )
            for at in layers
        ]
    return parts


def _errors(layers: Sequence[LayerMetrics]) -> list[_Errors]:
    parts = []
    for name, field in (
        ("MLP", "mlp_error"),
        ("Attention", "attention_error"),
        ("MLP input", "mlp_input_error"),
        ("Attention input", "attention_input_error"),
    ):
        known = [at for at in layers if getattr(at, field) is not None]
        kept = [getattr(at, field) for at in known]
        dropped = [getattr(at, f"{field}_without_fold") for at in known]
        parts.append(_Errors(name, [at.layer for at in known], kept, dropped))
    return parts


def _errors_title(parts: Sequence[_Errors]) -> str:
    saved = [(part.name, part.saved_share) for part in parts]
    words = [
        f"{name if name.startswith('MLP') else name.lower()} error by {100 * share:.0f} %"
        for name, share in saved
        if share is not None and share > 0
    ]
    if words:
        return f"Folding cuts the {' and the '.join(words)} (median layer)"
    worst = ", ".join(f"{part.name} at most {max(part.kept):#.2g}" for part in parts)
    return f"Error that pruning leaves in a layer's output: {worst}"


def _draw_widths(
    axes: Axes, layers: Sequence[int], widths: Sequence[tuple[int, int]], name: str
) -> None:
    kept, dense = zip(*widths, strict=True)
    axes.bar(layers, dense, width=0.8, color=GREY, label=f"dense: {_span(dense)}")
    axes.bar(
        layers,
        kept,
        width=0.8,
        color=BLUE,
        label=f"kept: {_span([each for each in kept if each] or kept)}",
    )
    axes.set_ylabel(f"{name} per layer")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_ylim(0, max(dense) * 1.04)
    _legend(axes)


def _draw_errors(axes: Axes, part: _Errors) -> None:
    known = [
        (layer, now, was)
        for layer, now, was in zip(part.layers, part.kept, part.dropped, strict=True)
        if was is not None
    ]
    values = [*part.kept, *(was for _, _, was in known)]
    size = 7 if len(part.layers) <= 40 else 4.5
    if known:
        layers, folded, dropped = zip(*known, strict=True)
        name = f"only dropped: median {median(dropped):#.2g}"
        axes.vlines(layers, folded, dropped, color=GREY, linewidth=size * 0.6, zorder=1)
        axes.plot(layers, dropped, "s", color=VERMILION, ms=size * 0.85, label=name, zorder=2)
    name = f"{'dropped and folded' if known else 'after pruning'}: median {median(part.kept):#.2g}"
    axes.plot(part.layers, part.kept, "o", color=BLUE, ms=size, label=name, zorder=3)
    # Of a sub-layer's input, it is what the first linear layers make of it.
    kind = "error" if part.name.endswith("input") else "output error"
    axes.set_ylabel(f"{part.name} {kind}\n(squared, relative)")
    axes.grid(axis="y", color="#EEEEEE")
    axes.set_axisbelow(True)
    _scale(axes, values)
    _legend(axes)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A log axis where the range asks for it; otherwise a linear one from zero."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_RANGE:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.5, high * 1.5)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 200 else (1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, (high or 1.0) * 1.08)


def _legend(axes: Axes) -> None:
    """The legend, above the axes, where it can hide nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderpad=0)


def figure_of(panels: float) -> Figure:
    """An empty figure as wide as all of them, and as high as so many panels need."""
    figure = Figure(figsize=(WIDTH_INCHES, 1.1 + 1.9 * panels), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, axes: Axes, title: str, layers: Sequence[int]) -> None:
    figure.suptitle(title, fontsize=11, fontweight="bold", color=INK, x=0.01, ha="left")
    axes.set_xlabel("layer (0 is nearest the input)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.set_xlim(min(layers) - 0.7, max(layers) + 0.7)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)


def draw_on(figure: Figure, path: str | Path) -> Path:
    """Write the PNG file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI)
    return path


def _kept(widths: Sequence[tuple[int, int]]) -> str:
    share = sum(now for now, _ in widths) / sum(was for _, was in widths)
    # Never "100.0 %" for something that lost a unit.
    return "all" if share == 1 else f"{min(100 * share, 99.9):.1f} %"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
