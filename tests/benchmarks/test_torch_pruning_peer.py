"""Torch-Pruning beside ours: what it is asked to remove is gone, and the model still runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.torch_pruning_peer import torch_pruned
from tests.tiny import tiny_model

pytest.importorskip("torch_pruning")


def test_never_less_is_removed_than_asked(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    ids_NL = torch.randint(5, model.config.vocab_size, (4, 32))
    pruned, share = torch_pruned(str(tmp_path), ids_NL, 0.2)
    assert 0.2 <= share < 0.45
    width = pruned.config.intermediate_size
    assert width < model.config.intermediate_size
    queries = model.model.layers[0].self_attn.q_proj.weight.shape
    for layer in pruned.model.model.layers:
        assert layer.mlp.down_proj.weight.shape[1] == width
        assert layer.self_attn.q_proj.weight.shape == queries
    assert pruned.model(ids_NL[:1]).logits.isfinite().all()
