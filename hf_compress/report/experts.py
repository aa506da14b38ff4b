"""What the card says of experts, as text."""

from __future__ import annotations

from hf_compress.report.metrics import Metrics


def sentences(metrics: Metrics) -> list[str]:
    """How experts were chosen and what became of them; nothing where none was to go."""
    pruning = metrics.pruning
    if pruning is None or pruning.experts is None:
        return []
    fate = "merged into the nearest kept one" if pruning.experts == "merge" else "dropped"
    lost = max((at.routed_share_removed or 0 for at in metrics.layers), default=0)
    return [
        f"Experts by `{pruning.expert_criterion}`, those removed {fate}; in a layer, they had up "
        f"to {100 * lost:.1f} % of what its router gave out."
    ]


def counts(metrics: Metrics) -> list[tuple[int, int]]:
    """Experts of all layers together, before and after; nothing for a model without."""
    before = sum(at.num_experts_before or 0 for at in metrics.layers)
    return [(before, sum(at.num_experts or 0 for at in metrics.layers))] if before else []
