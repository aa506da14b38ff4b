"""What the card says of the residual stream, which most runs leave as wide as it is."""

from __future__ import annotations

from hf_compress.report.metrics import Metrics


def widths(metrics: Metrics) -> list[tuple[int, int]]:
    """Channels before and after, one pair where some were removed."""
    pruning = metrics.pruning
    if pruning is None or pruning.hidden_size is None or pruning.hidden_size_before is None:
        return []
    return [(pruning.hidden_size_before, pruning.hidden_size)]
