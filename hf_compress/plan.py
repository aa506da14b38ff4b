"""The plan: which decoder blocks stay, and how wide. The seam between deciding and cutting.

`plan.json` is for people too: it may be read, edited and run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from hf_compress.errors import PlanError


class LayerPlan(BaseModel):
    """Widths of one decoder block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    intermediate_size: int = Field(ge=1)
    """MLP neurons; in a mixture of experts, those of every one of them."""
    num_key_value_heads: int = Field(ge=1)
    heads_per_group: int | None = Field(None, ge=1)
    """Query heads of each KV group; None for as many as the dense model has."""
    num_experts: int | None = Field(None, ge=1)
    """None in a model without experts. A layer without them, in a model that has some, says
    the number of the others; `intermediate_size` is then that of one expert."""
    skip: tuple[Literal["attention", "mlp"], ...] = ()
    """Sub-layers that go as a whole, each with its norms; its widths above then say nothing."""

    @field_validator("skip")
    @classmethod
    def _one_sublayer_at_most(cls, skip: tuple[str, ...]) -> tuple[str, ...]:
        if len(skip) > 1:
            raise ValueError(
                f"skip {list(skip)} leaves nothing of the layer or names one sub-layer twice; name "
                "one, or leave the layer out of layers and kept_layers"
            )
        return skip


class Plan(BaseModel):
    """Widths of the decoder blocks of a model that stay."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: str
    layers: list[LayerPlan] = Field(min_length=1)
    """One for each block that stays, in order."""
    kept_layers: list[int] | None = None
    """Their indices in the dense model; None where all stay, or where it is yet to be chosen
    which do."""
    hidden_size: int | None = Field(None, ge=1)
    """Channels of the residual stream that stay; None for all."""

    @model_validator(mode="after")
    def _kept_layers_are_the_layers(self) -> Plan:
        kept = self.kept_layers
        if kept is not None and (
            len(kept) != len(self.layers) or kept != sorted(set(kept)) or kept[0] < 0
        ):
            raise ValueError(
                f"kept_layers {kept} has to name {len(self.layers)} layers, one for each entry of "
                "layers, in ascending order from 0 on"
            )
        return self

    @property
    def positions(self) -> dict[int, int]:
        """By its index in the dense model, where a block that stays stands in `layers`."""
        kept = range(len(self.layers)) if self.kept_layers is None else self.kept_layers
        return {index: position for position, index in enumerate(kept)}

    @classmethod
    def uniform(
        cls,
        model_type: str,
        num_layers: int,
        intermediate_size: int,
        num_key_value_heads: int,
        heads_per_group: int | None = None,
        num_experts: int | None = None,
    ) -> Plan:
        """The same widths in every block.

        Raises:
            PlanError: a width that leaves a layer without units.
        """
        if intermediate_size < 1 or num_key_value_heads < 1:
            raise PlanError(
                f"the plan leaves {intermediate_size} MLP neurons and {num_key_value_heads} KV "
                "groups in a layer, and each needs at least 1; lower the sparsity or round_to"
            )
        layer = LayerPlan(
            intermediate_size=intermediate_size,
            num_key_value_heads=num_key_value_heads,
            heads_per_group=heads_per_group,
            num_experts=num_experts,
        )
        return cls(model_type=model_type, layers=[layer] * num_layers)

    def check(
        self,
        model_type: str,
        num_layers: int,
        intermediate_size: int,
        num_key_value_heads: int,
        heads_per_group: int | None = None,
        layer_types: Sequence[str] | None = None,
        num_experts: tuple[int, int] | None = None,
    ) -> None:
        """Raise PlanError unless the plan fits a dense model of these sizes.

        Args:
            heads_per_group: query heads of each KV group, None where they are not cut.
            layer_types: the kind of attention of each dense layer, None where all are alike.
            num_experts: how many a token takes, and how many a layer has; None where none has.
        """
        if self.model_type != model_type:
            raise PlanError(f"the plan is for {self.model_type!r}, the model is {model_type!r}")
        if self.kept_layers is None and len(self.layers) != num_layers:
            raise PlanError(
                f"the plan has {len(self.layers)} layers, the model {num_layers}; kept_layers says "
                "which stay"
            )
        if max(self.positions) >= num_layers:
            raise PlanError(
                f"the plan keeps layer {max(self.positions)}, and the last one of the model is "
                f"{num_layers - 1}"
            )
        for index, layer in enumerate(self.layers):
            for name, have in (
                ("intermediate_size", intermediate_size),
                ("num_key_value_heads", num_key_value_heads),
                ("heads_per_group", heads_per_group),
            ):
                planned = getattr(layer, name)
                if planned is not None and have is not None and planned > have:
                    raise PlanError(
                        f"layer {index} of the plan keeps {name}={planned}, "
                        f"but the model has only {have}"
                    )
            self._check_experts(index, layer.num_experts, num_experts)
        self._check_attention(layer_types or ["attention"] * num_layers)

    @staticmethod
    def _check_experts(index: int, planned: int | None, have: tuple[int, int] | None) -> None:
        if planned is None:
            return
        if have is None:
            raise PlanError(
                f"layer {index} of the plan keeps num_experts={planned}, but the model has no "
                "experts; take num_experts out"
            )
        least, most = have
        if not least <= planned <= most:
            raise PlanError(
                f"layer {index} of the plan keeps num_experts={planned}, but the model has {most}, "
                f"of which a token takes {least}; name a number from {least} to {most}"
            )

    def _check_attention(self, layer_types: Sequence[str]) -> None:
        """The first layer of each type keeps its attention (see `attention_that_stays`)."""
        seen = set()
        for dense_index, position in self.positions.items():
            kind = layer_types[dense_index]
            if kind not in seen and "attention" in self.layers[position].skip:
                raise PlanError(
                    f"layer {position} of the plan skips attention, and is the first with {kind}: "
                    "how many tokens are cached is asked of that layer's cache, so that cached "
                    "decoding would be silently wrong; skip the attention of a later layer"
                )
            seen.add(kind)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers that stay are alike and whole, as in a native checkpoint."""
        return len(set(self.layers)) == 1 and not self.layers[0].skip

    @property
    def widths(self) -> LayerPlan:
        """The widths that all layers share, whatever they skip; PlanError where they differ."""
        shared = {layer.model_copy(update={"skip": ()}) for layer in self.layers}
        if len(shared) > 1:
            raise PlanError(
                "the plan's layers differ in width; look at each of layers, or give all the same "
                "intermediate_size, num_key_value_heads and heads_per_group"
            )
        return shared.pop()


def compose(plans: Sequence[Plan]) -> Plan:
    """What several plans make of a model, each of what the one before has left."""
    whole, *later = plans
    for plan in later:
        before = list(whole.positions)
        layers = [
            layer.model_copy(
                update={
                    "heads_per_group": layer.heads_per_group or whole.layers[index].heads_per_group,
                    "skip": layer.skip or whole.layers[index].skip,
                }
            )
            for index, layer in zip(plan.positions, plan.layers, strict=True)
        ]
        kept = [before[index] for index in plan.positions]
        chosen = whole.kept_layers is not None or plan.kept_layers is not None
        whole = plan.model_copy(
            update={
                "layers": layers,
                "kept_layers": kept if chosen else None,
                "hidden_size": plan.hidden_size or whole.hidden_size,
            }
        )
    return whole


def load_plan(path: Path) -> Plan:
    """Read plan.json; raises PlanError with the path of each fault."""
    try:
        return Plan.model_validate_json(path.read_bytes())
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        raise PlanError(f"{path} is not a valid plan: {faults}") from error


def save_plan(plan: Plan, path: Path) -> None:
    path.write_text(plan.model_dump_json(indent=1) + "\n", encoding="utf-8")
