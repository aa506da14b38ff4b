"""What a recipe says of `stage: search`, and budgets in the units that people write them in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from hf_compress.recipe.strict import Strict

Searched = Literal["mlp_neurons", "kv_groups", "layers", "attention_sublayers", "mlp_sublayers"]

COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
BYTES |= {"KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30}
SECONDS = {"US": 1e-6, "MS": 1e-3, "S": 1.0}
FLOPS = {f"{prefix}FLOPS": factor for prefix, factor in COUNTS.items() if prefix != "B"}
UNITS = {
    "parameters": COUNTS,
    "non_embedding_parameters": COUNTS,
    "weight_bytes": BYTES,
    "kv_bytes_per_token": BYTES,
    "flops_per_token": FLOPS,
    "prefill_latency": SECONDS,
    "decode_latency": SECONDS,
}
"""Units of an absolute amount, by the name of the budget."""


def _checked(value: float | str) -> float | str:
    if isinstance(value, bool):
        raise ValueError("is neither a share nor an amount")
    if isinstance(value, str):
        return value
    if not 0 < value <= 1:
        raise ValueError(
            "is no share of the dense model's, which lies between 0 and 1; an absolute amount "
            'needs a unit, such as "90M" parameters, "120 MB" or "25 ms"'
        )
    return value


Amount = Annotated[float | str, BeforeValidator(_checked)]


class Budget(Strict):
    """What the compressed model may cost at most; each a share of what the dense model costs,
    or an absolute amount with its unit. All that are given hold together."""

    parameters: Amount | None = None
    """All of them, tied ones once: 0.7, or "90M"."""
    non_embedding_parameters: Amount | None = None
    """Without the token embedding and the head."""
    weight_bytes: Amount | None = None
    """Of the weights: 0.7, or "180 MB"."""
    kv_bytes_per_token: Amount | None = None
    """That the KV cache grows by: 0.5, or "12 KB"."""
    flops_per_token: Amount | None = None
    """Multiplications and additions for one token: 0.5, or "120 MFLOPs"."""
    prefill_latency: Amount | None = None
    """Of one pass over `batch_size` prompts of `context` tokens, as measured here: 0.6, or
    "300 ms"."""
    decode_latency: Amount | None = None
    """Of one decoding step of `batch_size` sequences with `context` tokens in the cache, as
    measured here: 0.6, or "12 ms"."""

    @model_validator(mode="after")
    def _units(self) -> Budget:
        if not self.given:
            raise ValueError(f"names no budget; the known ones are {', '.join(UNITS)}")
        for name, amount in self.given.items():
            if isinstance(amount, str):
                _absolute(name, amount)
        return self

    @property
    def given(self) -> dict[str, float | str]:
        """Those that are not None."""
        return {name: value for name, value in self if value is not None}

    def limits(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Absolute amounts, in parameters, bytes, FLOPs or seconds, of what is known.

        Args:
            dense: what the dense model costs, by the names of the budgets.
        """
        return {
            name: _absolute(name, value) if isinstance(value, str) else value * dense[name]
            for name, value in self.given.items()
            if name in dense
        }


def _absolute(name: str, amount: str) -> float:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", amount)
    units = UNITS[name]
    if not found or found[2].upper() not in units or not float(found[1]) > 0:
        shown = ", ".join(unit for unit in units if unit)
        raise ValueError(f"{name} {amount!r} is not a positive number with a unit of {shown}")
    return float(found[1]) * units[found[2].upper()]


class Search(Strict):
    """Finds the widths that lose the least under budgets; the `prune` stage behind it, which
    then says no sparsity, cuts to them."""

    stage: Literal["search"] = "search"
    budget: Budget
    uniform: bool = True
    """All layers alike, in a native checkpoint: the search chooses between KV groups, neurons
    and layers. Otherwise each layer gets its own widths, in a checkpoint that loads with
    `trust_remote_code=True` or after `import hf_compress`."""
    structures: list[Searched] = Field(["mlp_neurons", "kv_groups"], min_length=1)
    """What may be removed. `layers` goes with `uniform: true`; `attention_sublayers` and
    `mlp_sublayers`, whole ones, with `uniform: false`."""
    ignore: list[str] = Field([])
    """Modules to leave alone, as in `prune`."""
    round_to: int = Field(64, ge=1)
    """MLP widths are multiples of this."""
    generations: int = Field(16, ge=0)
    """Of the evolution, with `uniform: false`; 0 takes the solver's optimum as it is."""
    offspring: int = Field(16, ge=1)
    """Children in a generation."""
    patience: int = Field(6, ge=1)
    """Generations without a better child after which the evolution ends."""
    batch_size: int = Field(1, ge=1)
    """Sequences at once, for latencies."""
    context: int = Field(512, ge=8)
    """Tokens of a prompt, or in the cache, for latencies and FLOPs."""

    @model_validator(mode="after")
    def _consistent(self) -> Search:
        wrong = {"layers"} if not self.uniform else {"attention_sublayers", "mlp_sublayers"}
        if found := wrong.intersection(self.structures):
            raise ValueError(
                f"structures names {', '.join(sorted(found))}, which uniform: "
                f"{str(self.uniform).lower()} cannot use; leave it out, or set uniform the other "
                "way"
            )
        return self
