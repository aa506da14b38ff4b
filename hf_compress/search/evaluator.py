"""KL to the dense model of many genomes at once.

Genomes that agree up to a layer share one walk up to there: a child differs from its parent in
few layers, and a probe from the dense model in one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm

from hf_compress.model.blocks import attention_half, mlp_half
from hf_compress.model.divergence import compare, next_tokens
from hf_compress.model.walk import Walk
from hf_compress.search.database import Database
from hf_compress.search.space import Genome

MAX_WALKS = 64
"""Genomes that are carried through the model at once; each has its hidden states in memory."""


class Evaluator:
    """Measures genomes on the same windows.

    Args:
        database: the widths that genomes choose from.
        ids_NL: token ids.
        progress: show a bar, in blocks.
    """

    def __init__(self, database: Database, ids_NL: torch.Tensor, *, progress: bool = False) -> None:
        self._database = database
        self._progress = progress
        self._ids_NL = ids_NL
        self._dense: Walk | None = None

    @property
    def num_tokens(self) -> int:
        """Of one genome's measurement."""
        return self._ids_NL.numel()

    def kl(self, genomes: Sequence[Genome]) -> torch.Tensor:
        """KL [genomes, N] of every genome on every window, in nats, float64."""
        found = []
        for start in range(0, len(genomes), MAX_WALKS):
            some = genomes[start : start + MAX_WALKS]
            walks = self._carry(some)
            targets_NP = next_tokens(self._ids_NL).targets_NP
            unique = {id(walk): walk for walk in walks}
            compared = compare(self._reference(), list(unique.values()), targets_NP)
            kl_of = {key: each.kl_N for key, each in zip(unique, compared, strict=True)}
            found += [kl_of[id(walk)] for walk in walks]
        return torch.stack(found)

    def _reference(self) -> Walk:
        """The dense model's, behind its last block."""
        if self._dense is None:
            source = self._database.source
            self._dense = Walk(source, self._ids_NL)
            for layer in range(source.config.num_hidden_layers):
                with source.block(layer) as block:
                    self._dense.advance(block, layer)
        return self._dense

    def _carry(self, genomes: Sequence[Genome]) -> list[Walk]:
        """A walk behind the last block for each genome; equal ones share it."""
        source, space = self._database.source, self._database.space
        branches = [(Walk(source, self._ids_NL), list(range(len(genomes))))]
        blocks = range(source.config.num_hidden_layers)
        name = f"{len(genomes)} candidates"
        for layer in tqdm(blocks, desc=name, unit="block", disable=not self._progress):
            split: list[tuple[Walk, list[int]]] = []
            by_units: dict[tuple[int, int], list[Walk]] = defaultdict(list)
            for walk, members in branches:
                groups: dict[tuple[int, int], list[int]] = defaultdict(list)
                for member in members:
                    groups[space.units(genomes[member], layer)].append(member)
                walks = [walk, *(walk.fork() for _ in range(len(groups) - 1))]
                for (units, those), own in zip(groups.items(), walks, strict=True):
                    split.append((own, those))
                    by_units[units].append(own)
            with source.block(layer) as block:
                for units, those_walks in by_units.items():
                    cut = self._cut(block, layer, *units)
                    if cut is None:
                        continue
                    for walk in those_walks:
                        walk.advance(cut, layer)
            branches = split
        walk_of = {member: walk for walk, members in branches for member in members}
        return [walk_of[member] for member in range(len(genomes))]

    def _cut(self, block: nn.Module, layer: int, groups: int, neurons: int) -> nn.Module | None:
        """The block with so many units; None where nothing is left of it."""
        family = self._database.source.family
        if not groups and not neurons:
            return None
        if not groups or not neurons:
            # The half that stays, cut beside a whole one that then falls silent.
            whole = self._database.space.dense
            all_groups, all_neurons = self._database.space.units(whole, layer)
            cut = self._database.cut(block, layer, groups or all_groups, neurons or all_neurons)
            return mlp_half(cut, family) if neurons else attention_half(cut, family)
        return self._database.cut(block, layer, groups, neurons)
