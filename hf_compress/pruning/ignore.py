"""What a recipe leaves alone: patterns over module names, as in llm-compressor's `ignore`.

A pattern is a glob, or after `re:` a regular expression that has to match from the start
of a name. A block of which it matches anything is not dropped; an attention or MLP module
of which it matches anything keeps its widths, and is not dropped either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.errors import RecipeError
from hf_compress.heterogeneous.modeling_hfc_layers import attention_that_stays
from hf_compress.model.blocks import meta_model
from hf_compress.model.families import Family, family_of, has_experts
from hf_compress.model.patterns import SHOWN, matching
from hf_compress.recipe import SUBLAYERS, Prune, Structure

CUTS: dict[Structure, str] = {
    "mlp_neurons": "mlp",
    "kv_groups": "attention",
    "query_heads": "attention",
    "experts": "mlp",
    "expert_neurons": "mlp",
}
"""The field of `Family` that names what a structure narrows."""


@dataclass(frozen=True)
class Ignored:
    """Indices of decoder blocks.

    Attributes:
        layers: not to be dropped.
        widths: those whose attention and whose MLP keep their widths, by the field of
            `Family` that names the part.
    """

    layers: frozenset[int]
    widths: dict[str, frozenset[int]]

    @property
    def named(self) -> frozenset[int]:
        """Blocks that stay, but nothing in them was named: neither of their halves goes."""
        return self.layers.difference(*self.widths.values())


def protected_layers(config: PretrainedConfig, settings: Prune) -> frozenset[int]:
    """Layers that a recipe keeps from being dropped."""
    if not settings.ignore:
        return frozenset()
    return find_ignored(meta_model(config, torch.float32), settings.ignore).layers


def kept_sublayers(config: PretrainedConfig, settings: Prune) -> dict[str, frozenset[int]]:
    """Layers whose `attention` and whose `mlp` cannot be left out: those that a recipe keeps,
    and the attention by which the cache is measured."""
    types = getattr(config, "layer_types", None)
    needed = frozenset(attention_that_stays(types, config.num_hidden_layers))
    kept: dict[str, frozenset[int]] = {"attention": needed, "mlp": frozenset()}
    if settings.ignore:
        ignored = find_ignored(meta_model(config, torch.float32), settings.ignore)
        kept = {part: kept[part] | ignored.widths[part] | ignored.named for part in kept}
    return kept


def find_ignored(model: PreTrainedModel, patterns: list[str]) -> Ignored:
    """What the patterns match in a model, which may be on the meta device.

    Raises:
        RecipeError: a pattern matches nothing, or is no regular expression.
    """
    family = family_of(model.config)
    names = [name for name, _ in model.named_modules() if name]
    hits = {name for pattern in patterns for name in matching(pattern, names, family)}
    count = model.config.num_hidden_layers

    def touched(*modules: str) -> frozenset[int]:
        places = [
            (index, f"{family.layers}.{index}{module}")
            for index in range(count)
            for module in modules
        ]
        return frozenset(
            index
            for index, place in places
            if any(name == place or name.startswith(f"{place}.") for name in hits)
        )

    attention = (family.attention, *family.attention_inputs, family.attention_output)
    # By its linear layers too: not every family has a module of its own for the MLP.
    mlp = (family.mlp, *family.mlp_inputs, family.mlp_output)
    widths = {
        part: touched(*(f".{module}" for module in modules))
        for part, modules in (("attention", attention), ("mlp", mlp))
    }
    return Ignored(touched(""), widths)


def allowed_structures(
    model: PreTrainedModel, settings: Prune
) -> tuple[frozenset[Structure], frozenset[int]]:
    """The structures that may really go, and the layers that may not be dropped.

    Raises:
        RecipeError: nothing is left to prune, or a single layer would have to stay wider
            than the others.
    """
    structures = set(settings.structures)
    if not settings.ignore:
        return frozenset(structures), frozenset()
    ignored = find_ignored(model, settings.ignore)
    count = model.config.num_hidden_layers
    _require_effect(ignored, structures, family_of(model.config))
    config = model.config
    mixed = frozenset(index for index in range(count) if has_experts(config, index))
    for structure, part in CUTS.items():
        able = mixed if structure in ("experts", "expert_neurons") else frozenset(range(count))
        kept = ignored.widths[part] & able
        if structure in structures and 0 < len(kept) < len(able):
            raise RecipeError(
                f"ignore keeps the {part} of {_listed(kept)} wider than that of the others, and a "
                f"native checkpoint has one width for all of its layers; ignore the {part} of "
                f"every layer, or of none, or take {structure} out of structures"
            )
        if kept:
            structures.discard(structure)
    if len(ignored.layers) == count:
        structures.discard("layers")
    for sublayers, part in SUBLAYERS.items():
        if len(ignored.widths[part] | ignored.named) == count:
            structures.discard(sublayers)
    if not structures:
        raise RecipeError(
            f"ignore leaves nothing of structures {', '.join(settings.structures)} to prune; take "
            "out a pattern, or allow more structures"
        )
    return frozenset(structures), ignored.layers


def _require_effect(ignored: Ignored, structures: set[Structure], family: Family) -> None:
    """A block's own name only keeps it from being dropped; say so where nothing drops it."""
    if ignored.named and not structures & {"layers", *SUBLAYERS}:
        block = f"{family.layers}.{min(ignored.named)}"
        raise RecipeError(
            f"ignore keeps {_listed(ignored.named)} from being dropped, which structures do not "
            f"allow anyway; for a block that keeps its widths write {block}.*"
        )


def _listed(layers: frozenset[int]) -> str:
    first = ", ".join(map(str, sorted(layers)[:SHOWN]))
    return f"layer{'s' * (len(layers) > 1)} {first}{', ...' * (len(layers) > SHOWN)}"
