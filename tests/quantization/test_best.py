"""Effort `best`: codes that learn, block by block."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_compress.errors import RecipeError
from hf_compress.formats.bitsandbytes import FourBit
from hf_compress.formats.grid import Grid
from hf_compress.model.blocks import ModelInMemory
from hf_compress.model.walk import Walk
from hf_compress.quantization.error_feedback import ErrorFeedback
from hf_compress.quantization.learned import Rounded, learn_codes, start_inside
from hf_compress.recipe import Quantize, parse_recipe
from hf_compress.regression.curvature import Curvature
from tests.tiny import WIDE, random_ids, tiny_model

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def grid() -> Grid:
    return FourBit("nf4").grid(torch.float32)


def weight_and_curvature(outputs: int = 32, inputs: int = 128) -> tuple[torch.Tensor, Curvature]:
    torch.manual_seed(0)
    inputs_TI = torch.randn(600, inputs) @ (torch.eye(inputs) + 0.3 * torch.randn(inputs, inputs))
    return torch.randn(outputs, inputs), Curvature(inputs_TI.T @ inputs_TI)


def test_a_start_inside_its_cell_has_the_codes_it_was_given() -> None:
    weight_OI, curvature = weight_and_curvature()
    codes = ErrorFeedback(curvature).quantize(weight_OI, grid())
    latent_OI = start_inside(weight_OI, codes, grid())
    again = Rounded(codes, grid(), transposed=False).codes(latent_OI)
    assert torch.equal(again.codes_OI, codes.codes_OI)
    # And it is nearer to the weight than what is read back.
    assert (latent_OI - weight_OI).norm() < (codes.weight(grid()) - weight_OI).norm()


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_rounded_passes_its_gradient_on(transposed: bool) -> None:
    weight_OI, curvature = weight_and_curvature()
    codes = ErrorFeedback(curvature).quantize(weight_OI, grid())
    rounded = Rounded(codes, grid(), transposed)
    latent = weight_OI.T.clone() if transposed else weight_OI.clone()
    latent.requires_grad_(True)
    value = rounded(latent)
    assert value.shape == latent.shape
    value.sum().backward()
    assert latent.grad is not None and rounded.scale_OB.grad is not None
    # All but clipped ones move with their weight, one for one.
    moved = latent.grad.isclose(torch.ones(()))
    assert ((latent.grad == 0) | moved).all() and moved.float().mean() > 0.9
    assert rounded.scale_OB.grad.count_nonzero() == rounded.scale_OB.numel()


def test_learning_lowers_the_error_of_a_block() -> None:
    source = ModelInMemory(tiny_model(**WIDE))
    walk, beside = (Walk(source, random_ids(32, 16), 4) for _ in range(2))
    with source.block(0) as found:
        beside.advance(found, 0)
        codes = {}
        for name in LINEARS:
            weight_OI = found.get_submodule(name).weight.detach()
            identity = Curvature(torch.eye(weight_OI.shape[1]))
            codes[name] = ErrorFeedback(identity).quantize(weight_OI, grid())
        settings = Quantize(effort="best", epochs=12, batch_size=4, learning_rate=5e-3)
        before = {name: each.codes_OI.clone() for name, each in codes.items()}
        block, learned, report = learn_codes(
            found, found, codes, dict.fromkeys(codes, grid()), 0, walk, beside, settings
        )
    assert report.error_last < 0.8 * report.error_first
    changed = [(learned[name].codes_OI != before[name]).float().mean().item() for name in LINEARS]
    assert all(0 < share < 0.5 for share in changed)
    for name in LINEARS:
        weight_OI = block.get_submodule(name).weight
        assert torch.allclose(weight_OI, learned[name].weight(grid()), atol=1e-6)


def test_a_run(quantized_once: Callable[..., Path], wide: Path) -> None:
    folder = quantized_once(effort="best", epochs=4)
    report = json.loads((Path(f"{folder}.work") / "quantize/report.json").read_text())
    assert len(report["learning"]) == 2
    assert all(block["error_last"] < block["error_first"] for block in report["learning"])
    # What was learned is what was written: norms changed, and codes are read back as weights.
    stored, before = (load_file(at / "model.safetensors") for at in (folder, wide))
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(stored[norm], before[norm])
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8


def test_nothing_to_learn_from() -> None:
    with pytest.raises(RecipeError, match="effort best learns from text"):
        parse_recipe(
            {
                "model": "m",
                "output": "o",
                "stages": [{"stage": "quantize", "effort": "best", "calibrated": False}],
            }
        )
