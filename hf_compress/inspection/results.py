"""What an inspection found, as data: the contents of its JSON file.

The table and the picture are derived from one `Inspection`, so that they cannot disagree.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    # NaN has no place in JSON, and a comparison with it is silently false.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class MassiveActivations(_Strict):
    """Outliers of the residual stream after one decoder layer.

    Massive as in Sun et al. 2024 ("Massive activations in large language models"): a
    magnitude above 100 and at least 1,000 times the median magnitude of its window.
    """

    max_magnitude: float = Field(ge=0)
    median_magnitude: float = Field(ge=0)
    """Median over all entries of a window; the median of those over the windows."""
    max_to_median: float = Field(ge=0)
    """Largest magnitude over the median of the same window, in the most extreme window."""
    num_entries: int = Field(ge=0)
    """Massive entries in all windows together."""
    channels: list[int]
    """Channels of the hidden size that hold them, ascending."""


class LayerInspection(_Strict):
    """One decoder layer."""

    layer: int = Field(ge=0)
    intermediate_size: int = Field(ge=1)
    dead_neurons: list[int]
    """MLP neurons that give next to nothing to the MLP's output, ascending."""
    duplicate_groups: list[list[int]]
    """MLP neurons that rise and fall together: the one with the largest output first."""
    removable_neurons: dict[float, int]
    """By relative squared error of the MLP's output: how many neurons can go for it when
    the rest is folded. Folded on one half of the text and measured on the other."""
    mlp_effective_rank: float = Field(ge=0)
    """Of the MLP's output, in dimensions of the hidden size; a short text lowers it."""
    attention_effective_rank: float = Field(ge=0)
    """Of the attention's output, likewise."""
    massive_activations: MassiveActivations

    @property
    def num_duplicates(self) -> int:
        """Neurons that could be merged into another: all but one of every group."""
        return sum(len(group) - 1 for group in self.duplicate_groups)

    def removable_share(self, level: float) -> float:
        """Share of the neurons that can go at an error of `level`."""
        return self.removable_neurons[level] / self.intermediate_size


class Inspection(_Strict):
    """A whole model on one text."""

    hf_compress_version: str
    model: str
    text: str
    """What the model was read on, in words."""
    num_windows: int = Field(ge=2)
    max_seq_length: int = Field(ge=1)
    """Tokens in a window."""
    hidden_size: int = Field(ge=1)
    dead_share: float = Field(gt=0)
    """A neuron is dead when its output energy is at most this share of the mean."""
    duplicate_cosine: float = Field(gt=0, le=1)
    """Two neurons are near-duplicates from this |cosine| of their centred activations on."""
    layers: list[LayerInspection] = Field(min_length=1)

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.max_seq_length

    @property
    def num_neurons(self) -> int:
        """MLP neurons of all layers."""
        return sum(layer.intermediate_size for layer in self.layers)

    @property
    def error_levels(self) -> list[float]:
        """Relative squared errors that `removable_neurons` speaks of, ascending."""
        return sorted(self.layers[0].removable_neurons)

    def removable_share(self, level: float) -> float:
        """Share of all neurons that can go when every layer may have an error of `level`."""
        return sum(layer.removable_neurons[level] for layer in self.layers) / self.num_neurons

    @property
    def massive_layers(self) -> list[LayerInspection]:
        """Layers after which the residual stream holds massive activations."""
        return [layer for layer in self.layers if layer.massive_activations.num_entries]


def kept_neurons(inspection: Inspection) -> list[torch.Tensor]:
    """What stays of every layer when exactly the dead neurons and the duplicates go.

    Of a group of near-duplicates the neuron with the largest output stays; the others have
    to be folded into it (`regression.fold.KeptRegression.fold`), not just dropped.

    Returns:
        Sorted indices, int64, for each layer.
    """
    kept = []
    for layer in inspection.layers:
        stays = torch.ones(layer.intermediate_size, dtype=torch.bool)
        stays[layer.dead_neurons] = False
        for _, *others in layer.duplicate_groups:
            stays[others] = False
        kept.append(stays.nonzero().flatten())
    return kept
