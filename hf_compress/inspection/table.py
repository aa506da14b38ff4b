"""An inspection in words: lines for the terminal, one row a layer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from hf_compress.inspection.results import Inspection, LayerInspection

HEADLINE_LEVEL = 0.01
"""The error at which a model's redundancy is put into one number."""
TOKENS_PER_NEURON = 20
"""Under this a fold begins to fit the text instead of the model, as in calibration."""
MOST_CHANNELS = 3
LINE = 79


def table_lines(inspection: Inspection) -> list[str]:
    """Aligned lines: what was read, one row a layer, all layers, and the finding."""
    rows = [*_headers(inspection), *(_row(layer) for layer in inspection.layers)]
    rows.append(_total(inspection))
    upper, lower, *body, total = (line.rstrip() for line in _aligned(rows))
    rule = "-" * max(map(len, (lower, *body)))
    return [
        f"{inspection.model}, read on {inspection.num_windows} windows of "
        f"{inspection.max_seq_length} tokens of {inspection.text}",
        "",
        upper,
        lower,
        rule,
        *body,
        rule,
        total,
        "",
        *(line for text in _legend(inspection) for line in _wrapped(text)),
        "",
        *_wrapped(summary(inspection)),
    ]


def summary(inspection: Inspection) -> str:
    """How redundant the model is, in one sentence."""
    others = " and ".join(
        f"{percent(inspection.removable_share(level))} at {percent(level)}"
        for level in inspection.error_levels
        if level != HEADLINE_LEVEL
    )
    most, least = extremes(inspection)
    sentence = f"In short: {finding(inspection)} ({others}); {_merged(inspection)}"
    if len(inspection.layers) > 1:
        sentence += (
            f"; layer {most.layer} is the most redundant "
            f"({percent(most.removable_share(HEADLINE_LEVEL))} can go), layer {least.layer} the "
            f"least ({percent(least.removable_share(HEADLINE_LEVEL))})"
        )
    return f"{sentence}."


def finding(inspection: Inspection) -> str:
    """The headline: the share of the neurons that can go at an error of 1 %."""
    share = inspection.removable_share(HEADLINE_LEVEL)
    return f"{percent(share)} of the MLP neurons can go at {percent(HEADLINE_LEVEL)} output error"


def extremes(inspection: Inspection) -> tuple[LayerInspection, LayerInspection]:
    """The layers of which most and least can go."""
    ordered = sorted(inspection.layers, key=lambda at: at.removable_share(HEADLINE_LEVEL))
    return ordered[-1], ordered[0]


def percent(share: float) -> str:
    """Such as `12 %`, `3.4 %`, `0.1 %`; never `0 %` or `100 %` of what is only nearly so."""
    value = 100 * share
    if 0 < value < 0.1:
        return "under 0.1 %"
    if 99 < value < 100:
        return "over 99 %"
    return f"{value:.0f} %" if value >= 10 or value.is_integer() else f"{value:.1f} %"


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs drawn together: `2, 11 to 28`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        str(run[0]) if len(run) == 1 else f"{run[0]}{' to ' if run[2:] else ', '}{run[-1]}"
        for run in runs
    )


def _merged(inspection: Inspection) -> str:
    dead = sum(len(layer.dead_neurons) for layer in inspection.layers)
    duplicates = sum(layer.num_duplicates for layer in inspection.layers)
    return f"dead: {dead:,}, near-duplicates: {duplicates:,}"


def _headers(inspection: Inspection) -> list[list[str]]:
    levels = inspection.error_levels
    return [
        ["", "", "near-", "in", *["can go" for _ in levels], "MLP", "attn", "max/", "massive"],
        ["layer", "dead", "dupl.", "groups"]
        + [f"{100 * level:g} %" for level in levels]
        + ["rank", "rank", "median", "channel"],
    ]


def _row(layer: LayerInspection) -> list[str]:
    massive = layer.massive_activations
    return [
        str(layer.layer),
        f"{len(layer.dead_neurons):,}",
        f"{layer.num_duplicates:,}",
        f"{len(layer.duplicate_groups):,}",
        *(f"{count:,}" for _, count in sorted(layer.removable_neurons.items())),
        f"{layer.mlp_effective_rank:.0f}",
        f"{layer.attention_effective_rank:.0f}",
        f"{massive.max_to_median:,.0f}",
        _channels(massive.channels),
    ]


def _total(inspection: Inspection) -> list[str]:
    layers = inspection.layers
    columns = (
        [len(layer.dead_neurons) for layer in layers],
        [layer.num_duplicates for layer in layers],
        [len(layer.duplicate_groups) for layer in layers],
        *([at.removable_neurons[level] for at in layers] for level in inspection.error_levels),
    )
    mean = [
        sum(layer.mlp_effective_rank for layer in layers) / len(layers),
        sum(layer.attention_effective_rank for layer in layers) / len(layers),
    ]
    worst = max(layer.massive_activations.max_to_median for layer in layers)
    channels = {each for layer in layers for each in layer.massive_activations.channels}
    return [
        "all",
        *(f"{sum(column):,}" for column in columns),
        *(f"{rank:.0f}" for rank in mean),
        f"{worst:,.0f}",
        _channels(sorted(channels)),
    ]


def _channels(channels: Sequence[int]) -> str:
    shown = ", ".join(str(channel) for channel in channels[:MOST_CHANNELS])
    more = len(channels) - MOST_CHANNELS
    return f"{shown}, +{more}" if more > 0 else shown or "-"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Numbers to the right; the last column, which is a list, to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [cell.rjust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
            + [row[-1].ljust(widths[-1])]
        )
        for row in rows
    ]


def _wrapped(text: str) -> list[str]:
    """Lines of one paragraph, the later ones indented; no number parts from its per cent."""
    joined = text.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.wrap(joined, LINE, subsequent_indent="  ", break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _legend(inspection: Inspection) -> list[str]:
    widths = sorted({layer.intermediate_size for layer in inspection.layers})
    lines = [
        f"{inspection.num_neurons:,} MLP neurons, {' or '.join(f'{width:,}' for width in widths)} "
        f"a layer; ranks out of a hidden size of {inspection.hidden_size:,}.",
        f"dead: output energy at most {inspection.dead_share:g} of the layer's mean.",
        f"near-dupl.: neurons saved by merging groups with |cosine| >= "
        f"{inspection.duplicate_cosine:g} of their centred activations.",
        "can go: neurons removed in OBS order and folded into the rest, at that relative squared "
        "error of the layer's MLP output, measured on text that the fold did not see.",
    ]
    if massive := inspection.massive_layers:
        lines.append(
            f"massive activations after layer {spans(layer.layer for layer in massive)}: more "
            "than 100, and 1,000 times the median of the residual stream."
        )
    density = inspection.num_tokens / max(widths)
    if density < TOKENS_PER_NEURON:
        lines.append(
            f"{density:.1f} tokens a neuron is little text: with more (--num-samples) the fold "
            "mostly does better, and more neurons can go."
        )
    return lines
