"""Perplexity of both models and KL between them, walking block by block."""

from __future__ import annotations

from tqdm import tqdm

from hf_compress.model.blocks import BlockSource
from hf_compress.model.divergence import Divergence, Questions, compare
from hf_compress.model.walk import Walk


def measure_divergence(
    dense: BlockSource, compressed: BlockSource, questions: Questions
) -> Divergence:
    """Both models on the same windows; memory holds one block of one model at a time."""
    walks = []
    for name, source in (("dense", dense), ("compressed", compressed)):
        walk = Walk(source, questions.ids_NL)
        for index in tqdm(
            range(source.config.num_hidden_layers), desc=f"evaluate {name}", unit="block"
        ):
            with source.block(index) as block:
                walk.advance(block, index)
        walks.append(walk)
    return compare(walks[0], walks[1:], questions.targets_NP)[0]
