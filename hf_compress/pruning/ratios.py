"""Which share of each linear layer's weights becomes zero.

Legend: O outputs (rows) of a linear layer, I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PretrainedConfig

from hf_compress.errors import RecipeError
from hf_compress.model.blocks import BlockSource, meta_model
from hf_compress.model.families import family_of
from hf_compress.model.layers import dense_type, sublayers_of
from hf_compress.model.surgery import weight_of
from hf_compress.pruning.weights import WEIGHT_CRITERIA
from hf_compress.recipe import Sparsify

Shares = list[dict[str, float]]
"""Of every block, the share of zeros of each linear layer, by its name in the block."""


def check_sparsify(config: PretrainedConfig, settings: Sparsify) -> int:
    """How many weights there are to choose from.

    Raises:
        RecipeError: an unknown criterion, a model with blocks whose linear layers FAMILIES
            does not list, or rows that do not divide into the groups of a pattern.
    """
    if settings.criterion not in WEIGHT_CRITERIA:
        raise RecipeError(
            f"unknown criterion {settings.criterion!r}; the valid ones are "
            f"{', '.join(WEIGHT_CRITERIA)}"
        )
    model = meta_model(config, torch.float32)
    total = 0
    for index in range(config.num_hidden_layers):
        block = f"{family_of(config).layers}.{index}"
        linears = {name for name, module in model.get_submodule(block).named_modules()}
        for name in linear_names(config, index):
            if name not in linears:
                raise RecipeError(
                    f"{block} has no linear layer {name}, as FAMILIES says of "
                    f"{dense_type(config)}; single weights of experts cannot be zeroed yet. Use "
                    "stage prune"
                )
            shape = weight_of(model.get_submodule(block), name, family_of(config)).shape
            _check_groups(settings.pattern, f"{block}.{name}", shape[1])
            total += shape.numel()
    return total


def linear_names(config: PretrainedConfig, index: int) -> list[str]:
    """Linear layers of a block, in the order in which it runs them."""
    sublayers = sublayers_of(family_of(config), config, index)
    return [name for sublayer in sublayers for name in sublayer.linears]


def _check_groups(pattern: str, name: str, inputs: int) -> None:
    group = int(pattern.split(":")[1]) if ":" in pattern else 1
    if inputs % group:
        raise RecipeError(
            f"pattern {pattern} needs rows that are a multiple of {group} weights long, and those "
            f"of {name} have {inputs}; choose an M that divides it, or prune to such a width first"
        )


def uniform_shares(config: PretrainedConfig, share: float) -> Shares:
    """The same everywhere."""
    return _of_each_block(config, [share] * config.num_hidden_layers)


def _of_each_block(config: PretrainedConfig, shares: list[float]) -> Shares:
    return [dict.fromkeys(linear_names(config, index), share) for index, share in enumerate(shares)]


def owl_shares(
    source: BlockSource, settings: Sparsify, norms: Iterable[dict[str, torch.Tensor]]
) -> Shares:
    """Fewer zeros in blocks with many outliers among |w_ij| ||x_j|| (Yin et al. 2024).

    A block's share lies below the mean in proportion to how far its part of outliers lies
    above the mean part, at most `max_deviation`; the mean is `sparsity`. (In the paper the
    *range* is twice that and lies wherever the mean puts it.)

    Args:
        norms: of every block, ||x_j|| over the calibration text, by the layer's name.
    """
    parts = []
    for index, norms_I in enumerate(norms):
        with source.block(index) as block:
            scores = torch.cat([
                (weight_of(block, name, source.family).detach().abs().float() * norm_I).flatten()
                for name, norm_I in norms_I.items()
            ])  # fmt: skip
        outliers = scores > settings.outlier_threshold * scores.mean()
        parts.append(outliers.double().mean().item())
    centred = torch.tensor(parts, dtype=torch.float64)
    centred -= centred.mean()
    reach = min(settings.max_deviation, settings.share, 1 - settings.share)
    widest = centred.abs().max().item()
    shares = settings.share - centred * (reach / widest if widest else 0.0)
    return _of_each_block(source.config, shares.tolist())


def global_shares(source: BlockSource, share: float) -> Shares:
    """Of each layer, how many of its weights are among the smallest of the whole model.

    The threshold is found in two passes over the bits of |w| in float32, whose order as
    integers is theirs as numbers: the upper half of the bits says in which bin it lies, the
    lower half where in there. Ties at the threshold go in the order of the layers.
    """

    def histogram(upper: int | None) -> torch.Tensor:
        counts = torch.zeros(BINS, dtype=torch.int64)
        for index in range(source.config.num_hidden_layers):
            with source.block(index) as block:
                for name in linear_names(source.config, index):
                    bits = _magnitude_bits(weight_of(block, name, source.family).detach())
                    inside = bits >> 16 if upper is None else bits[bits >> 16 == upper] & 0xFFFF
                    counts += torch.bincount(inside, minlength=BINS).cpu()
        return counts

    upper_counts = histogram(None)
    target = round(share * int(upper_counts.sum()))
    upper, below = _bin_of(upper_counts, target)
    lower, below = _bin_of(histogram(upper), target, below)
    return _shares_below(source, upper << 16 | lower, ties=target - below)


BINS = 1 << 16


def _bin_of(counts: torch.Tensor, target: int, below: int = 0) -> tuple[int, int]:
    """The bin in which the `target`-th smallest lies, and how many lie in the bins below."""
    upto = counts.cumsum(0) + below
    found = int(torch.searchsorted(upto, target))
    return found, int(upto[found] - counts[found])


def _shares_below(source: BlockSource, threshold: int, ties: int) -> Shares:
    shares = []
    for index in range(source.config.num_hidden_layers):
        row = {}
        with source.block(index) as block:
            for name in linear_names(source.config, index):
                bits = _magnitude_bits(weight_of(block, name, source.family).detach())
                equal = min(ties, int((bits == threshold).sum()))
                ties -= equal
                row[name] = (int((bits < threshold).sum()) + equal) / len(bits)
        shares.append(row)
    return shares


def _magnitude_bits(weight_OI: torch.Tensor) -> torch.Tensor:
    return weight_OI.float().abs().flatten().view(torch.int32).long()
