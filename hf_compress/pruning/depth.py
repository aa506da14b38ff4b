"""Which whole layers go, where the plans only say how many.

Block influence (ShortGPT, Men et al. 2024: 1 - mean cosine between a block's input and its
output, in the dense model) names a few that do little; of those, the one goes whose loss
costs the least KL to the dense model, then the next one beside it, and so on. The layers
are chosen once, for the plan that drops the most; the others drop the first of them.

Cost: a pass of the fitness windows through the dense model, and for each dropped layer one
through what is left, from which those without a candidate branch off where it stands: at
most 1 + `CONSIDERED` passes, mostly half of that.

The attention and the MLP of a layer are chosen likewise, each among its own kind.

Legend: N windows, B windows in a batch, L tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from hf_compress.model.blocks import BlockSource, attention_half, mlp_half
from hf_compress.model.divergence import compare, next_tokens
from hf_compress.model.families import Family
from hf_compress.model.walk import Walk
from hf_compress.plan import Plan

Part = Literal["layer", "attention", "mlp"]
CONSIDERED = 4
"""Layers of the least influence whose loss is measured before one of them is dropped."""


def most_passes(dropped: int) -> int:
    """Passes of the fitness windows through the model that choosing so many layers costs."""
    return 1 + dropped * (1 + CONSIDERED)


@dataclass(frozen=True)
class Drop:
    """One layer, or the attention or MLP of one, that goes after those chosen before it.

    Attributes:
        layer: its index in the dense model.
        influence: block influence, of that half of the block where only half goes.
        kl: KL to the dense model without it and those before it, by fitness windows.
        kl_standard_error: over the windows.
        considered: KL without each of the layers that it was chosen among.
    """

    layer: int
    influence: float
    kl: float
    kl_standard_error: float
    considered: dict[int, float]
    part: Part = "layer"


def settle_layers(
    source: BlockSource,
    plans: list[Plan],
    fitness_NL: torch.Tensor,
    protected: frozenset[int] = frozenset(),
) -> tuple[list[Plan], list[Drop]]:
    """The plans with `kept_layers` filled in where layers go and the plan leaves open which,
    and how these were chosen.

    Args:
        protected: layers that stay.
    """
    count = source.config.num_hidden_layers
    most = max(_still_to_go(plan, count) for plan in plans)
    if most == 0:
        return plans, []
    drops = choose_layers(source, fitness_NL, most, protected)
    settled = []
    for plan in plans:
        if plan.kept_layers is not None:
            settled.append(plan)
            continue
        gone = {drop.layer for drop in drops[: count - len(plan.layers)]}
        kept = [index for index in range(count) if index not in gone] if gone else None
        settled.append(plan.model_copy(update={"kept_layers": kept}))
    return settled, drops


def _still_to_go(plan: Plan, count: int) -> int:
    """How many layers are to be chosen that the plan drops."""
    return count - len(plan.layers) if plan.kept_layers is None else 0


def choose_layers(
    source: BlockSource,
    fitness_NL: torch.Tensor,
    most: int,
    protected: frozenset[int] = frozenset(),
    part: Part = "layer",
) -> list[Drop]:
    """The layers that go, or lose a part, in that order."""
    dense = Walk(source, fitness_NL)
    targets_NP = next_tokens(fitness_NL).targets_NP
    influence = _influence(dense, part)
    drops: list[Drop] = []
    for _ in tqdm(range(most), desc=f"choose {part}s", unit="block"):
        gone = {drop.layer for drop in drops}
        free = set(influence) - gone - protected
        candidates = sorted(free, key=lambda index: influence[index])[:CONSIDERED]
        walks = _without(source, fitness_NL, gone, candidates, part)
        kls = [found.kl for found in compare(dense, walks, targets_NP)]
        best = min(range(len(candidates)), key=lambda which: kls[which][0])
        considered = {index: kl for index, (kl, _) in zip(candidates, kls, strict=True)}
        layer = candidates[best]
        drops.append(Drop(layer, influence[layer], *kls[best], considered, part))
    return drops


def _influence(dense: Walk, part: Part) -> dict[int, float]:
    """Block influence of every layer or part; the walk then stands behind the last one."""
    source, influence = dense.source, {}
    for index in tqdm(range(source.config.num_hidden_layers), desc="influence", unit="block"):
        cosines = []
        with source.block(index) as block:
            for name, piece in _pieces(block, source.family, part).items():
                for hidden_BLD in dense.batches():
                    out_BLD = dense.run(piece, index, hidden_BLD)
                    if name == part:
                        before_BLD = hidden_BLD.to(out_BLD.device).float()
                        cosine_BL = torch.cosine_similarity(before_BLD, out_BLD.float(), dim=-1)
                        cosines.append(cosine_BL.flatten())
                    hidden_BLD.copy_(out_BLD)
        influence[index] = 1 - torch.cat(cosines).double().mean().item()
    return influence


def _pieces(block: nn.Module, family: Family, part: Part) -> dict[str, nn.Module]:
    """What windows go through one after the other."""
    if part == "layer":
        return {"layer": block}
    return {"attention": attention_half(block, family), "mlp": mlp_half(block, family)}


def _rest(block: nn.Module, family: Family, part: Part) -> nn.Module:
    """A block that lacks a part."""
    return mlp_half(block, family) if part == "attention" else attention_half(block, family)


def _without(
    source: BlockSource,
    fitness_NL: torch.Tensor,
    gone: set[int],
    candidates: Sequence[int],
    part: Part,
) -> list[Walk]:
    """For each candidate, a walk behind the last block of the model that lacks it and
    `gone`; up to the candidate, all share one."""
    trunk = Walk(source, fitness_NL)
    branches: dict[int, Walk] = {}
    for index in range(source.config.num_hidden_layers):
        if index in gone and part == "layer":
            continue
        before = list(branches.values())
        if index in candidates:
            branches[index] = trunk.fork()
        with source.block(index) as block:
            whole = block if index not in gone else _rest(block, source.family, part)
            for walk in (*before, trunk) if len(branches) < len(candidates) else before:
                walk.advance(whole, index)
            if index in candidates and part != "layer":
                branches[index].advance(_rest(block, source.family, part), index)
    return [branches[index] for index in candidates]
