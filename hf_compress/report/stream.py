"""What the card says of the residual stream, which most runs leave as wide as it is."""

from __future__ import annotations

from hf_compress.report.metrics import Metrics


def sentences(metrics: Metrics) -> list[str]:
    """How channels were chosen and what became of what reads them."""
    pruning = metrics.pruning
    if pruning is None or pruning.hidden_size is None:
        return []
    how = "folded into the others" if pruning.fold else "dropped"
    return [
        f"The residual stream is narrower: {pruning.hidden_size:,} of "
        f"{pruning.hidden_size_before:,} channels, ranked by `{pruning.channel_criterion}` over "
        f"all layers that read it, with what these read from the removed ones {how}. Channels "
        "with massive activations stay."
    ]


def widths(metrics: Metrics) -> list[tuple[int, int]]:
    """Channels before and after, one pair where some were removed."""
    pruning = metrics.pruning
    if pruning is None or pruning.hidden_size is None or pruning.hidden_size_before is None:
        return []
    return [(pruning.hidden_size_before, pruning.hidden_size)]
