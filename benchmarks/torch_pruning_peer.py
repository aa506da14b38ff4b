"""Torch-Pruning (Fang et al., CVPR 2023, from PyPI) on the MLP neurons, for comparison.

Its `GroupTaylorImportance` is the better of its criteria on language models: magnitude, which its
own example uses, ends over 10^5. Gradients of the language-model loss come from the same
calibration text. Neurons only, at uniform widths: with three KV groups its pruner leaves heads
that no checkpoint can express.
"""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_compress.model.blocks import ModelInMemory
from hf_compress.model.families import family_of
from hf_compress.model.parameters import count_parameters

ROUND_TO = 16


def torch_pruned(model: str, ids_NL: torch.Tensor, sparsity: float) -> tuple[ModelInMemory, float]:
    """The pruned model, and the share of the non-embedding parameters that it lost.

    Args:
        model: folder or Hub id of the dense model.
        ids_NL: calibration windows.
        sparsity: share to remove; never less goes.
    """
    import torch_pruning

    # Its tracing needs plain attention; gradients are summed in float32.
    dense = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    before = count_parameters(dense).non_embedding
    _sum_gradients(dense, ids_NL)
    family = family_of(dense.config)
    blocks = list(dense.get_submodule(family.layers).children())
    neurons = {block.get_submodule(name) for block in blocks for name in family.mlp_inputs}
    others = [m for m in dense.modules() if isinstance(m, nn.Linear) and m not in neurons]
    width = _width(dense, blocks[0], sparsity * before)
    pruner = torch_pruning.pruner.BasePruner(
        dense,
        ids_NL[:1, :16],
        importance=torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=1 - width / dense.config.intermediate_size,
        ignored_layers=others,
        output_transform=lambda out: out.logits,
    )
    pruner.step()
    dense.zero_grad()
    dense.config.intermediate_size = width
    after = count_parameters(dense).non_embedding
    source = ModelInMemory(dense.to(torch.bfloat16).eval())
    return source, 1 - after / before


def _width(dense: PreTrainedModel, block: nn.Module, must_go: float) -> int:
    """Neurons of each layer that stay."""
    family = family_of(dense.config)
    linears = (*family.mlp_inputs, family.mlp_output)
    of_mlp = sum(block.get_submodule(name).get_parameter("weight").numel() for name in linears)
    neurons = dense.config.intermediate_size
    neuron = of_mlp / neurons
    kept = neurons - must_go / dense.config.num_hidden_layers / neuron
    return int(kept // ROUND_TO) * ROUND_TO


def _sum_gradients(model: PreTrainedModel, ids_NL: torch.Tensor) -> None:
    """Of the language-model loss, over all windows."""
    model.train()
    model.zero_grad()
    for ids_L in tqdm(ids_NL, desc="gradients", unit="window"):
        # In bfloat16, as the model computes; the weights and their gradients are float32.
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            loss = model(ids_L[None].to(model.device), labels=ids_L[None].to(model.device)).loss
        loss.backward()
    model.eval()
