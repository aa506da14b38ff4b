"""Gram matrices of the neurons inside the experts of a layer, expert by expert.

Legend: B windows, L tokens, T tokens, D hidden size, E experts, K experts of one token, N neurons
of one expert, P pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PretrainedConfig

from hf_compress.calibration.collect import _Sums, warn_if_few_tokens
from hf_compress.calibration.experts import PAIRS_AT_A_TIME
from hf_compress.calibration.weighting import Weighting, weighted
from hf_compress.model.experts import NeuronProbe
from hf_compress.model.families import mlp_width
from hf_compress.model.walk import Walk, captured_input, require_finite
from hf_compress.statistics import NeuronMoments

LEAST_BYTES = 2**30
"""Of Gram matrices in memory at once, at least this many, so that experts which are many and
narrow need one pass over the text and not dozens."""
FOLD_BYTES = 6 * 8
"""Times N^2: what folding one layer of N inputs takes, in float32 halves and float64."""


def experts_at_a_time(count: int, width: int) -> int:
    """Of `count` experts of `width` neurons, how many have their Gram matrices in memory at
    once: those that fit into what folding one such layer takes, or into `LEAST_BYTES`."""
    room = max(LEAST_BYTES, FOLD_BYTES * width**2)
    return min(count, max(1, room // _gram_bytes(width)))


def neuron_bytes(count: int, width: int) -> int:
    """Memory that such Gram matrices, and the fold of one expert beside them, take."""
    return experts_at_a_time(count, width) * _gram_bytes(width) + FOLD_BYTES * width**2


def _gram_bytes(width: int) -> int:
    """Of one expert: two halves in float32."""
    return 2 * 4 * width**2


def collect_expert_neurons(
    walk: Walk, half: nn.Module, index: int, *, weighting: Weighting
) -> Iterator[NeuronMoments]:
    """Moments of every expert's neurons, one expert after the other; the walk stays.

    A token counts for an expert by the square of its gate, and by the weight that it has in
    every Gram matrix: errors are then those of what the expert adds to the residual stream.

    Args:
        half: the MLP half of block `index`, whose experts may be fewer than the model's.
        weighting: weight of a token, see `recipe.Calibrate`.
    """
    experts = walk.source.family.experts
    assert experts is not None
    probe = NeuronProbe(half, experts)
    size = experts_at_a_time(probe.count, probe.width)
    for start in range(0, probe.count, size):
        chunk = _Chunk.of(probe, range(start, min(start + size, probe.count)))
        _run(walk, half, index, experts.module, chunk, weighting)
        while chunk.sums:
            # One after the other, so that what was used can be let go.
            expert = min(chunk.sums)
            moments = chunk.sums.pop(expert).moments()
            yield NeuronMoments(expert, chunk.tokens[expert], moments.gram)


def warn_if_experts_get_few(
    num_samples: int, max_seq_length: int, config: PretrainedConfig
) -> None:
    """The same as `warn_if_few_tokens`, of the tokens that an expert gets on average."""
    share = config.num_experts_per_tok / config.num_experts
    of = "an expert that gets its share of the tokens"
    warn_if_few_tokens(num_samples, max_seq_length, mlp_width(config), share, of)


def _run(
    walk: Walk, half: nn.Module, index: int, name: str, chunk: _Chunk, weighting: Weighting
) -> None:
    batches = list(walk.batches())
    where = f"the residual stream after {walk.source.family.layers}.{index}.{name}"
    with captured_input(half, name) as captured:
        for number, hidden_BLD in enumerate(batches):
            stream_BLD = walk.run(half, index, hidden_BLD)
            require_finite(stream_BLD, where)
            inputs_TD, index_TK, gates_TK = captured
            _, scale_T1 = weighted(inputs_TD, stream_BLD, weighting)
            part = int(number >= (len(batches) + 1) // 2)
            chunk.add(part, inputs_TD, index_TK, gates_TK * scale_T1)


@dataclass
class _Chunk:
    """The experts whose moments are summed in one pass."""

    probe: NeuronProbe
    sums: dict[int, _Sums]
    tokens: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, probe: NeuronProbe, experts: range) -> _Chunk:
        sums = {
            expert: _Sums.zeros(f"expert {expert}", probe.width, 0, probe.device)
            for expert in experts
        }
        return cls(probe, sums, dict.fromkeys(experts, 0))

    def add(
        self, part: int, inputs_TD: torch.Tensor, index_TK: torch.Tensor, factor_TK: torch.Tensor
    ) -> None:
        """Add a batch to one half of the text; activations are multiplied with the factors."""
        expert_P = index_TK.flatten()
        mine_P = (expert_P >= min(self.sums)) & (expert_P <= max(self.sums))
        pairs = mine_P.nonzero().flatten()
        pairs = pairs[expert_P[pairs].argsort(stable=True)]
        for some in pairs.split(PAIRS_AT_A_TIME):
            activations_PN = self.probe(inputs_TD[some // index_TK.shape[1]], expert_P[some])
            activations_PN = activations_PN * factor_TK.flatten()[some, None].to(activations_PN)
            found, counts = expert_P[some].unique_consecutive(return_counts=True)
            pieces = activations_PN.split(counts.tolist())
            for expert, piece_TN in zip(found.tolist(), pieces, strict=True):
                self.sums[expert].part = part
                self.sums[expert].add_inputs(piece_TN)
                self.tokens[expert] += len(piece_TN)
