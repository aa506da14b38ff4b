"""What the card says of experts, as text."""

from __future__ import annotations

from hf_compress.report.metrics import Metrics


def sentences(metrics: Metrics) -> list[str]:
    """How experts and the neurons inside them were chosen, and what became of them; nothing
    where none was to go."""
    return _of_whole_experts(metrics) + _of_neurons(metrics)


def _of_neurons(metrics: Metrics) -> list[str]:
    narrower = [at for at in metrics.layers if at.experts_not_folded is not None]
    if not narrower:
        return []
    count = sum(at.num_experts or 0 for at in narrower)
    few = sum(at.experts_with_few_tokens or 0 for at in narrower)
    unfolded = sum(at.experts_not_folded or 0 for at in narrower)
    widths = {(at.intermediate_size, at.intermediate_size_before) for at in narrower}
    kept = ", ".join(f"{now:,} of {was:,}" for now, was in sorted(widths))
    lines = [
        f"Each expert keeps {kept} neurons, chosen on the tokens that its router gives it. Of "
        f"{count:,} experts, {few:,} got fewer tokens than they had neurons"
        + (", and how these fire together counted for less in the choice." if few else ".")
    ]
    if metrics.pruning and metrics.pruning.fold:
        lines[0] += (
            f" In {unfolded:,}, what was removed is dropped, as a half of the text was against "
            "the fold or held no token for it."
            if unfolded
            else " The fold paid on held-out text in all of them."
        )
    return lines


def _of_whole_experts(metrics: Metrics) -> list[str]:
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


def widths(metrics: Metrics) -> list[tuple[int, int]]:
    """Neurons of an expert before and after, one pair where some were removed."""
    pairs = {
        (at.intermediate_size_before, at.intermediate_size)
        for at in metrics.layers
        if at.num_experts
    }
    return sorted(pair for pair in pairs if pair[0] != pair[1])
