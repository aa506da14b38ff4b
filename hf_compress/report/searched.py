"""What the card says of widths that were searched for."""

from __future__ import annotations

from hf_compress.report.metrics import Metrics


def sentences(metrics: Metrics) -> list[str]:
    """The budgets, and what widths by layer gain over widths that all layers share."""
    search = metrics.pruning.search if metrics.pruning else None
    if search is None:
        return []
    allowed = ", ".join(
        f"{name.replace('_', ' ')} at most {100 * share:.1f} % of the dense model's"
        for name, share in search.budget.items()
    )
    line = f"Widths searched for under a budget: {allowed}."
    if search.kl is None or search.kl_of_uniform is None:
        return [f"{line} All layers are alike."]
    difference, error = search.kl_difference, search.kl_difference_standard_error
    compared = (
        f"on text held out from the search, KL {search.kl:.3f} with widths by layer, "
        f"{search.kl_of_uniform:.3f} with the best ones that all layers share (difference "
        f"{difference:+.3f} ± {error:.3f}, one standard error, paired over windows)"
    )
    verdict = (
        "so layers differ" if search.layers_differ else "which is no gain, so all layers are alike"
    )
    return [f"{line} After {search.generations} generations, {compared}, {verdict}."]
