"""What a search may choose: how many units each sub-layer keeps.

A *genome* holds, for each sub-layer of the space, the position of its level. It is what solver
and evolution work on; a `Plan` is what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from transformers import PretrainedConfig

from hf_compress.heterogeneous.auto import STEMS
from hf_compress.heterogeneous.modeling_hfc_layers import attention_that_stays
from hf_compress.model.surgery import Dimensions
from hf_compress.plan import LayerPlan, Plan
from hf_compress.recipe import Searched

MAX_LEVELS = 24
"""Widths of a sub-layer that are told apart, where each layer has its own."""
MAX_UNIFORM_LEVELS = 128
"""Where all layers share one."""

Genome = tuple[int, ...]
Kind = Literal["attention", "mlp"]


class Choice(NamedTuple):
    """One sub-layer and the units that it may keep."""

    layer: int
    kind: Kind
    levels: tuple[int, ...]
    """KV groups or MLP neurons, ascending; 0 where the whole sub-layer may go. The last is the
    dense model's."""


@dataclass(frozen=True)
class Space:
    """The sub-layers of a model, attention and MLP of each layer in turn.

    Attributes:
        model_type: of the model.
        choices: every sub-layer, also those with a single level.
    """

    model_type: str
    choices: tuple[Choice, ...]

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        structures: Sequence[Searched],
        round_to: int,
        frozen: frozenset[tuple[int, Kind]] = frozenset(),
        most: int = MAX_LEVELS,
    ) -> Space:
        """All levels that the structures allow.

        Args:
            round_to: MLP widths are multiples of this; coarser where there are many.
            frozen: sub-layers that stay as they are.
            most: levels of an MLP.
        """
        dims = Dimensions.of(config)
        groups, neurons = dims.num_key_value_heads, dims.intermediate_size
        attention = tuple(range(1, groups + 1)) if "kv_groups" in structures else (groups,)
        mlp = _widths(neurons, round_to, most) if "mlp_neurons" in structures else (neurons,)
        choices = []
        kinds = getattr(config, "layer_types", None)
        stays = attention_that_stays(kinds, config.num_hidden_layers)
        for layer in range(config.num_hidden_layers):
            may_skip = "attention_sublayers" in structures and layer not in stays
            of_attention = (0, *attention) if may_skip else attention
            of_mlp = (0, *mlp) if "mlp_sublayers" in structures else mlp
            kept = (layer, "attention") in frozen, (layer, "mlp") in frozen
            choices.append(Choice(layer, "attention", (groups,) if kept[0] else of_attention))
            choices.append(Choice(layer, "mlp", (neurons,) if kept[1] else of_mlp))
        return cls(config.model_type, tuple(choices))

    @property
    def dense(self) -> Genome:
        """Everything stays."""
        return tuple(len(choice.levels) - 1 for choice in self.choices)

    def units(self, genome: Genome, layer: int) -> tuple[int, int]:
        """KV groups and MLP neurons that a layer keeps."""
        attention, mlp = self.choices[2 * layer], self.choices[2 * layer + 1]
        return attention.levels[genome[2 * layer]], mlp.levels[genome[2 * layer + 1]]

    def nearest(self, groups: int, neurons: int) -> Genome:
        """The same widths in every layer, as near as its levels allow, rounded down where
        there is a narrower one."""
        wanted = {"attention": groups, "mlp": neurons}
        return tuple(
            max(
                (at for at, level in enumerate(choice.levels) if level <= wanted[choice.kind]),
                default=0,
            )
            for choice in self.choices
        )

    def plan(self, genome: Genome, config: PretrainedConfig) -> Plan:
        """What the genome keeps; a layer that loses both sub-layers goes as a whole."""
        dims = Dimensions.of(config)
        layers, kept_layers = [], []
        for layer in range(self.num_layers):
            groups, neurons = self.units(genome, layer)
            if not groups and not neurons:
                continue
            kept_layers.append(layer)
            layers.append(
                LayerPlan(
                    num_key_value_heads=groups or dims.num_key_value_heads,
                    intermediate_size=neurons or dims.intermediate_size,
                    skip=("attention",) if not groups else ("mlp",) if not neurons else (),
                )
            )
        some_gone = len(layers) < self.num_layers
        return Plan(
            model_type=self.model_type,
            layers=layers,
            kept_layers=kept_layers if some_gone else None,
        )

    @property
    def num_layers(self) -> int:
        """Of the dense model."""
        return len(self.choices) // 2


def whole_layer(config: PretrainedConfig) -> LayerPlan:
    """A layer of the dense model."""
    dims = Dimensions.of(config)
    return LayerPlan(
        num_key_value_heads=dims.num_key_value_heads, intermediate_size=dims.intermediate_size
    )


def layer_at(config: PretrainedConfig, kind: Kind, units: int) -> LayerPlan:
    """The same with so many units of one kind."""
    field = "num_key_value_heads" if kind == "attention" else "intermediate_size"
    return whole_layer(config).model_copy(update={field: units} if units else {"skip": (kind,)})


def stack(config: PretrainedConfig, layer: LayerPlan, count: int) -> list[LayerPlan]:
    """`count` such layers, to be looked at. The first is whole where layers may differ: any
    width is then legal in the others, also one that no native class can express."""
    whole = config.model_type in STEMS
    return [whole_layer(config) if whole else layer] + [layer] * (count - 1)


def _widths(dense: int, round_to: int, most: int) -> tuple[int, ...]:
    step = round_to * -(-dense // (round_to * most))
    return (*range(step, dense, step), dense)
