"""What calibration learned, on disk: the Gram matrices of what prunable units feed.

One safetensors file a block, memory-mapped on reading, so that statistics of a model
with hundreds of blocks cost no memory. Legend: I inputs (columns) of an output layer, E
experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_compress.errors import CompressionError

SUMMARY = "statistics.json"


@dataclass
class GramPair:
    """Gram matrices X X^T of one layer's inputs, from two halves of the text.

    Attributes:
        first_II: from the first half of the windows, float32.
        second_II: from the second half.
    """

    first_II: torch.Tensor
    second_II: torch.Tensor

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> GramPair:
        return cls(*(torch.zeros(width, width, device=device) for _ in range(2)))

    @property
    def total_II(self) -> torch.Tensor:
        """float64 sum of the halves."""
        return self.first_II.double().add_(self.second_II)


@dataclass
class CrossPair:
    """Where the dense model's residual stream goes, from the pruned model's inputs.

    With h the pruned stream before a layer's output is added and d the dense stream after
    it, T = d - h is what the layer would have to add to lead the pruned stream back.

    Attributes:
        first_DI: T X^T over the first half of the windows, float32; D is the hidden size.
        second_DI: over the second half.
        first_energy: ||T||^2 over the first half.
        second_energy: over the second half.
        of_inputs: whether T is what the layer reads in the dense model instead.
    """

    first_DI: torch.Tensor
    second_DI: torch.Tensor
    first_energy: float = 0.0
    second_energy: float = 0.0
    of_inputs: bool = False


@dataclass
class Moments:
    """What one output layer is fitted from; `cross` only where a dense stream ran beside."""

    gram: GramPair
    cross: CrossPair | None = None


@dataclass
class ExpertMoments:
    """What the experts of one layer did with the text, float64.

    Attributes:
        tokens_E: tokens that were routed to an expert.
        mass_E: sum of their gates.
        output_E: sum of gate times norm of what the expert made of the token.
        agreement_EE: sum of f_i(x) . f_j(x) over tokens x that were given to all experts.
    """

    tokens_E: torch.Tensor
    mass_E: torch.Tensor
    output_E: torch.Tensor
    agreement_EE: torch.Tensor


@dataclass
class NeuronMoments:
    """What the neurons of one expert did with the tokens that were routed to it.

    Attributes:
        expert: its index.
        tokens: how many tokens that were.
        gram: of its neurons' activations times the gate: of what is about to be added to the
            residual stream.
    """

    expert: int
    tokens: int
    gram: GramPair


@dataclass
class BlockStatistics:
    """Statistics of one decoder block of the dense model."""

    mlp: GramPair | None = None
    """Of the inputs of the MLP output layer (`down_proj`); None in a block with experts."""
    attention: GramPair | None = None
    """Of the inputs of the attention output layer (`o_proj`); None where no heads are cut."""
    experts: ExpertMoments | None = None


@dataclass
class StreamStatistics:
    """How the residual stream is read, means over all places where it is; float64.

    Attributes:
        gram_DD: Gram matrix of the stream, each token divided by its root mean square, and each
            channel at each place brought to its mean energy.
        readers_DD: W^T W of the weights W that read it there, in units of the energy of what
            they make of it; norm gains and these energies are counted as part of them.
        peak_D: of each channel, its largest activation over the median one.
    """

    gram_DD: torch.Tensor
    readers_DD: torch.Tensor
    peak_D: torch.Tensor


class Statistics:
    """Statistics of a whole model in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CompressionError(f"{folder} holds no {SUMMARY}: calibrate first") from error
        self.num_tokens: int = summary["num_tokens"]
        self.num_blocks: int = summary["num_blocks"]

    def block(self, index: int) -> BlockStatistics:
        tensors = load_file(_file(self.folder, index))
        pairs = {
            name: GramPair(tensors[f"{name}.first"], tensors[f"{name}.second"])
            for name in ("mlp", "attention")
            if f"{name}.first" in tensors
        }
        prefix = "experts."
        moments = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        return BlockStatistics(**pairs, experts=ExpertMoments(**moments) if moments else None)


def write_block(folder: Path, index: int, statistics: BlockStatistics) -> None:
    """Write one block's statistics into `folder`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in (("mlp", statistics.mlp), ("attention", statistics.attention)):
        if pair is not None:
            tensors |= {f"{name}.first": pair.first_II, f"{name}.second": pair.second_II}
    if statistics.experts is not None:
        tensors |= {f"experts.{name}": value for name, value in vars(statistics.experts).items()}
    save_file({name: value.cpu() for name, value in tensors.items()}, _file(folder, index))


def write_summary(folder: Path, num_tokens: int, num_blocks: int) -> None:
    """Write what completes a folder of statistics."""
    summary = {"num_tokens": num_tokens, "num_blocks": num_blocks}
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"
