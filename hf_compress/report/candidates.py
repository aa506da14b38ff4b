"""What the card says of each way to reach the sparsity."""

from __future__ import annotations

import math

from hf_compress.report.metrics import Candidate, Metrics


def candidate_fields(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Field, column and noun of what is said of each candidate; layers and query heads only
    where there was a choice, and for a mixture of experts these in the place of neurons, unless
    it is neurons that differ."""
    candidates = metrics.pruning.candidates if metrics.pruning else []
    mixture = any(one.num_experts for one in candidates)
    by_neurons = len({one.intermediate_size for one in candidates}) > 1
    told = {name for name in SUBLAYERS if any(_lacks(one, name) for one in candidates)}
    always = (
        "num_key_value_heads",
        "num_experts" if mixture and not by_neurons else "intermediate_size",
    )
    return [
        (name, column, noun)
        for name, column, noun in (
            ("num_hidden_layers", "Layers", "layers"),
            ("attention_sublayers", "Layers with attention", "layers with attention"),
            ("mlp_sublayers", "Layers with an MLP", "layers with an MLP"),
            ("num_key_value_heads", "KV groups per layer", "KV groups"),
            ("heads_per_group", "Query heads per KV group", "query heads in each"),
            ("num_experts", "Experts per layer", "experts"),
            (
                "intermediate_size",
                "Neurons per expert" if mixture else "MLP neurons per layer",
                "neurons of each expert" if mixture else "MLP neurons",
            ),
        )
        if name in always
        or (len({getattr(one, name) for one in candidates}) > 1 and name not in SUBLAYERS - told)
    ]


SUBLAYERS = {"attention_sublayers", "mlp_sublayers"}


def _lacks(candidate: Candidate, sublayers: str) -> bool:
    """Whether a layer that stays has lost this half."""
    return getattr(candidate, sublayers) not in (None, candidate.num_hidden_layers)


def candidate_name(metrics: Metrics, candidate: Candidate) -> str:
    """What tells it from the others, in words."""
    *first, last = (
        f"{getattr(candidate, name):,} {noun}" for name, _, noun in candidate_fields(metrics)
    )
    return f"{', '.join(first)} and {last}"


def choice(metrics: Metrics) -> str:
    """Whether the chosen candidate is told apart from the best of the others."""
    candidates = metrics.pruning.candidates if metrics.pruning else []
    chosen = next((one for one in candidates if one.chosen), None)
    others = [one for one in candidates if not one.chosen]
    if chosen is None or not others:
        return ""
    rival = min(others, key=lambda one: one.kl)
    error = math.hypot(chosen.kl_standard_error, rival.kl_standard_error)
    if abs(chosen.kl - rival.kl) >= 2 * error:
        return ""
    return (
        f"The chosen candidate and the one with {candidate_name(metrics, rival)} differ by "
        "less than two standard errors: this text cannot tell them apart."
    )
