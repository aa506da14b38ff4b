"""What the card says of layers, and of sub-layers, that went as a whole."""

from __future__ import annotations

from hf_compress.report.metrics import Metrics


def sentences(metrics: Metrics) -> list[str]:
    """Which ones they are, by their index in the dense model."""
    layers = metrics.layers
    gone = {
        "Whole layers dropped": [at.layer for at in layers if at.is_dropped],
        "Layers without their attention": [
            at.layer for at in layers if not at.num_key_value_heads and not at.is_dropped
        ],
        "Layers without their MLP": [
            at.layer for at in layers if not at.intermediate_size and not at.is_dropped
        ],
    }
    lines = [
        f"{what}, of {len(layers)}: {', '.join(map(str, indices))}."
        for what, indices in gone.items()
        if indices
    ]
    if lines and metrics.pruning and metrics.pruning.whole_by_kl:
        lines[-1] += (
            " Each was the one whose loss cost the least KL of those that change the hidden states "
            "least."
        )
    return lines
