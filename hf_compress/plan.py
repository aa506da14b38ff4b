"""The plan: how wide every decoder block shall be. The seam between deciding and cutting.

`plan.json` is for people too: it may be read, edited and run again.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hf_compress.errors import PlanError


class LayerPlan(BaseModel):
    """Widths of one decoder block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    intermediate_size: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    num_experts: int | None = Field(None, ge=1)
    """None in a model without experts. A layer without them, in a model that has some, says
    the number of the others; `intermediate_size` is then that of one expert."""


class Plan(BaseModel):
    """Widths of all decoder blocks of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: str
    layers: list[LayerPlan] = Field(min_length=1)

    @classmethod
    def uniform(
        cls,
        model_type: str,
        num_layers: int,
        intermediate_size: int,
        num_key_value_heads: int,
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
            num_experts=num_experts,
        )
        return cls(model_type=model_type, layers=[layer] * num_layers)

    def check(
        self, model_type: str, num_layers: int, intermediate_size: int, num_key_value_heads: int
    ) -> None:
        """Raise PlanError unless the plan fits a dense model of these sizes."""
        if self.model_type != model_type:
            raise PlanError(f"the plan is for {self.model_type!r}, the model is {model_type!r}")
        if len(self.layers) != num_layers:
            raise PlanError(f"the plan has {len(self.layers)} layers, the model {num_layers}")
        for index, layer in enumerate(self.layers):
            for name, have in (
                ("intermediate_size", intermediate_size),
                ("num_key_value_heads", num_key_value_heads),
            ):
                if getattr(layer, name) > have:
                    raise PlanError(
                        f"layer {index} of the plan keeps {name}={getattr(layer, name)}, "
                        f"but the model has only {have}"
                    )

    @property
    def widths(self) -> LayerPlan:
        """The widths that all layers share; PlanError where they differ."""
        if len(set(self.layers)) > 1:
            raise PlanError(
                "the plan's layers differ in width, which no native checkpoint can express; "
                "give every layer the same intermediate_size and num_key_value_heads"
            )
        return self.layers[0]


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
