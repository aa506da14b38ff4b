"""What corrupts a quantized checkpoint, and why ours are whole.

Facts about transformers 5.23 and bitsandbytes 0.50.2; where a later release has none of them, a
test fails and the note can go.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_compress.checkpoint import verify
from hf_compress.errors import CheckpointError

IDS = torch.arange(4, 36)[None]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="session")
def nearest(quantized_once: Callable[..., Path]) -> Path:
    """Rounded to nearest, so that what was chosen can be said without the run."""
    return quantized_once(format="nf4", calibrated=False)


def scales(folder: Path) -> dict[str, torch.Tensor]:
    stored = load_file(folder / "model.safetensors")
    return {name: value for name, value in stored.items() if name.endswith(".absmax")}


def test_saving_a_loaded_model_needs_a_word(nearest: Path, tmp_path: Path) -> None:
    """`save_original_format=False`, with which test_stage.py saves one again."""
    with pytest.raises(NotImplementedError):
        AutoModelForCausalLM.from_pretrained(nearest).save_pretrained(tmp_path)


def test_scales_are_written_before_any_forward(nearest: Path, wide: Path) -> None:
    """The run's own check has computed with the checkpoint since: what it holds is still what was
    chosen."""
    dense, found = load_file(wide / "model.safetensors"), scales(nearest)
    assert len(found) == 14
    for name, value in found.items():
        weight_OI = dense[name.removesuffix(".absmax")]
        _, state = bnb.quantize_4bit(weight_OI, blocksize=64, quant_type="nf4")
        assert torch.equal(value, state.absmax), name


@pytest.mark.skipif(
    not bnb.has_avx512bf16(), reason="repacking in place is done by CPUs with AVX512-BF16"
)
def test_scales_saved_after_a_forward_are_others(nearest: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(nearest).eval()
    with torch.no_grad():
        model(IDS)
    model.save_pretrained(tmp_path, save_original_format=False)
    before, after = scales(nearest), scales(tmp_path)
    assert any(not torch.equal(before[name], after[name]) for name in before.keys() & after)


def test_four_bits_do_not_load_without_their_configuration(nearest: Path) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(nearest, quantization_config=None)


@pytest.mark.parametrize(
    "settings",
    [{"format": "int8", "calibrated": False}, {"format": "W4A16", "block_size": 32}],
    ids=lambda settings: settings["format"],
)
def test_others_load_as_garbage_which_the_check_tells(
    settings: dict[str, Any], quantized_once: Callable[..., Path]
) -> None:
    folder = quantized_once(**settings)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, quantization_config=None)(IDS).logits
    with pytest.raises(CheckpointError, match="other logits"):
        verify(folder, IDS, logits, torch.device("cpu"), tolerance=0.1)
