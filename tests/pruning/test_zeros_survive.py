"""Zeros survive what users do with a sparse checkpoint: save it, load it, quantize it to NF4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_compress import compress
from tests.tiny import tiny_model, tiny_tokenizer

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 4}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_zeros_survive_nf4(pattern: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    share = {"sparsity": 0.5} if pattern == "unstructured" else {}
    recipe["stages"] = [{"stage": "sparsify", "pattern": pattern, **share}]
    sparse = compress(tiny_model(**SHAPE), tiny_tokenizer(), recipe)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    folder = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(recipe["output"]).save_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map="cpu"
    )
    weights = dict(sparse.named_parameters())
    checked = 0
    for name, module in quantized.named_modules():
        if name.endswith(LINEARS):
            packed = module.weight
            decoded_OI = bnb.dequantize_4bit(packed.data, packed.quant_state)
            zero_OI = weights[f"{name}.weight"] == 0
            assert zero_OI.float().mean() == pytest.approx(0.5, abs=0.01), name
            assert (decoded_OI[zero_OI] == 0).all(), name
            checked += 1
    assert checked == 2 * len(LINEARS)
