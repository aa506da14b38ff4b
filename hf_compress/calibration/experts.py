"""What the experts of a layer do with the calibration text.

Legend: B windows, L tokens, T tokens, D hidden size, E experts, K experts of one token.
"""

from __future__ import annotations

import torch
from torch import nn

from hf_compress.calibration.weighting import Weighting, weighted
from hf_compress.model.walk import Walk, captured_input, require_finite
from hf_compress.statistics import ExpertMoments

SHARED_TOKENS = 512
"""Tokens of the whole text that are given to every expert, so that outputs can be compared."""
PAIRS_AT_A_TIME = 4096
"""Outputs [D] of single experts in memory at once."""


def collect_experts(
    walk: Walk, half: nn.Module, index: int, *, weighting: Weighting, advance: bool = False
) -> ExpertMoments:
    """Run the windows through the MLP half of a block and look at its experts.

    Gates and norms are taken as they are (REAP, Lasby et al. 2025, eq. 9): an expert that makes a
    massive activation is one not to lose. Only where outputs are compared do tokens weigh what
    they weigh in a Gram matrix.

    Args:
        half: the MLP half of block `index`.
        weighting: weight of a token, see `recipe.Calibrate`.
        advance: overwrite the walk's hidden states with what the half gives.
    """
    family = walk.source.family
    assert family.experts is not None
    name = family.experts.module
    experts, count = half.get_submodule(name), walk.source.config.num_experts
    where = f"the residual stream after {family.layers}.{index}.{name}"
    sums_3E = torch.zeros(3, count, dtype=torch.float64, device=walk.source.device)
    agreement_EE = torch.zeros(count, count, dtype=torch.float64, device=walk.source.device)
    batches = list(walk.batches())
    shared = -(-SHARED_TOKENS // len(batches))
    with captured_input(half, name) as captured:
        for hidden_BLD in batches:
            stream_BLD = walk.run(half, index, hidden_BLD)
            require_finite(stream_BLD, where)
            inputs_TD, index_TK, gates_TK = captured
            sums_3E += _routed(experts, inputs_TD, index_TK, gates_TK, count)
            sample = _spread(len(inputs_TD), shared, inputs_TD.device)
            _, scale_T1 = weighted(inputs_TD, stream_BLD, weighting)
            agreement_EE += _agreement(experts, inputs_TD[sample], scale_T1[sample], count)
            if advance:
                hidden_BLD.copy_(stream_BLD)
    tokens_E, mass_E, output_E = sums_3E
    return ExpertMoments(tokens_E.clone(), mass_E.clone(), output_E.clone(), agreement_EE)


@torch.no_grad()
def outputs(experts: nn.Module, inputs_TD: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    """What each of a token's experts makes of it, without its gate, [T, K, D]."""
    index_P1 = index_TK.reshape(-1, 1)
    pairs_PD = inputs_TD.repeat_interleave(index_TK.shape[1], 0)
    ones_P1 = torch.ones_like(index_P1, dtype=inputs_TD.dtype)
    return experts(pairs_PD, index_P1, ones_P1).view(*index_TK.shape, -1)


def _routed(
    experts: nn.Module,
    inputs_TD: torch.Tensor,
    index_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """Tokens, gates, and gates times norms of the output, summed for each expert, [3, E]."""
    size = max(1, PAIRS_AT_A_TIME // index_TK.shape[1])
    norms = [
        torch.linalg.vector_norm(outputs(experts, *chunk), dim=-1, dtype=torch.float32)
        for chunk in zip(inputs_TD.split(size), index_TK.split(size), strict=True)
    ]
    gates_P = gates_TK.double().flatten()
    weights_3P = (torch.ones_like(gates_P), gates_P, gates_P * torch.cat(norms).double().flatten())
    index_P = index_TK.flatten()
    return torch.stack([torch.bincount(index_P, one, count) for one in weights_3P])


def _agreement(
    experts: nn.Module, inputs_TD: torch.Tensor, scale_T1: torch.Tensor, count: int
) -> torch.Tensor:
    """Inner products [E, E] of what all experts make of the same tokens."""
    total_EE = torch.zeros(count, count, dtype=torch.float64, device=inputs_TD.device)
    every_E = torch.arange(count, device=inputs_TD.device)
    size = max(1, PAIRS_AT_A_TIME // count)
    for some_TD, some_T1 in zip(inputs_TD.split(size), scale_T1.split(size), strict=True):
        made_TED = outputs(experts, some_TD, every_E.expand(len(some_TD), -1))
        made_EF = (made_TED.float() * some_T1[..., None]).movedim(1, 0).flatten(1)
        total_EE += (made_EF @ made_EF.T).double()
    return total_EE


def _spread(size: int, wanted: int, device: torch.device) -> torch.Tensor:
    """Indices of `wanted` of `size` tokens (or all), evenly apart."""
    wanted = min(wanted, size)
    return (torch.arange(wanted, device=device) * 2 + 1) * size // (2 * wanted)
