"""What a checkpoint stores against what a model holds, by transformers' own rules.

In memory all experts of a layer are one tensor, on disk each has its own; the rules that
`from_pretrained` and `save_pretrained` go by are applied here to one tensor at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


@dataclass
class Source:
    """What on disk a tensor of the model is made of.

    Attributes:
        target: name of the tensor in the model.
        patterns: the pattern of the converter that each tensor on disk answers to, by the
            name it has there, in the order of the experts.
        converter: makes one tensor of several; None where one is only renamed.
    """

    target: str
    patterns: dict[str, str | None] = field(default_factory=dict)
    converter: WeightConverter | None = None

    @property
    def names(self) -> list[str]:
        return list(self.patterns)


class Conversion:
    """The rules for one model.

    Args:
        model: the causal LM; one on the meta device will do.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def sources(self, stored: Iterable[str]) -> dict[str, Source]:
        """What the tensors of the model are made of, by their name in the model.

        Args:
            stored: names on disk; those that the model does not hold are left out.
        """
        state = self._model.state_dict()
        by_pattern = {
            pattern: converter
            for converter in self._converters
            for pattern in converter.source_patterns
        }
        found: dict[str, Source] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(
                name, self._renamings, self._converters, self._model.base_model_prefix, state
            )
            if target not in state and name in state:
                target, pattern = name, None
            if target in state:
                source = found.setdefault(target, Source(target))
                source.patterns[name] = pattern
                source.converter = by_pattern[pattern] if pattern else None
        return found

    def to_memory(self, source: Source, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tensor of the model that `stored` (names and tensors on disk) makes."""
        if source.converter is None:
            return stored[source.names[-1]]
        converter = copy.deepcopy(source.converter)
        for name, pattern in source.patterns.items():
            converter.add_tensor(source.target, name, pattern, stored[name])
        made = converter.convert(source.target, model=self._model, config=self._model.config)
        return made[source.target]

    def to_disk(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What `save_pretrained` would store of tensors of the model, by name."""
        return revert_weight_conversion(self._model, state)
