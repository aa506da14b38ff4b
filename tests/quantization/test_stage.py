"""`stage: quantize` in bitsandbytes' formats: what stock libraries read is what was chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

import hf_compress.pipeline as pipeline
from hf_compress import compress
from hf_compress.errors import ModelError, RecipeError
from hf_compress.model.blocks import StreamedCheckpoint
from hf_compress.model.loading import load_config
from hf_compress.recipe import parse_recipe
from tests.tiny import WIDE, tiny_model, tiny_tokenizer

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = {
    "nf4": {"format": "nf4"},
    "nf4-32": {"format": "nf4", "block_size": 32},
    "nf4-nested": {"format": "nf4", "double_quant": True},
    "fp4": {"format": "fp4"},
    "fp4-nested": {"format": "fp4", "double_quant": True},
    "int8": {"format": "int8"},
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="session")
def runs(quantized_once: Callable[..., Path]) -> Callable[[str, bool], Path]:
    """Outputs of runs by name of the settings, and whether they are calibrated."""
    return lambda name, calibrated: quantized_once(calibrated=calibrated, **SETTINGS[name])


def quantized(recipe: dict[str, Any], model: Path, **settings: Any) -> Path:
    recipe |= {"model": str(model), "stages": [{"stage": "quantize", **settings}]}
    return pipeline.run(parse_recipe(recipe))


def decoded(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What bitsandbytes makes of every weight that it holds."""
    return {
        name: dequantize_bnb_weight(module.weight, getattr(module, "state", None))
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    }


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_stock_libraries_read_what_was_chosen(
    name: str, calibrated: bool, runs: Callable[[str, bool], Path]
) -> None:
    folder = runs(name, calibrated)
    stock = decoded(AutoModelForCausalLM.from_pretrained(folder))
    assert len(stock) == 2 * len(LINEARS)
    ours = StreamedCheckpoint(folder, load_config(folder), torch.bfloat16, torch.device("cpu"))
    for index in range(2):
        with ours.block(index) as block:
            for linear in LINEARS:
                part = "mlp" if linear in LINEARS[4:] else "self_attn"
                weight = block.get_parameter(f"{part}.{linear}.weight")
                there = stock[f"model.layers.{index}.{part}.{linear}"]
                assert torch.equal(weight, there.to(weight)), linear


@pytest.mark.parametrize("name", SETTINGS)
def test_uncalibrated_codes_are_those_of_bitsandbytes(
    name: str, runs: Callable[[str, bool], Path], wide: Path, tmp_path: Path
) -> None:
    settings = SETTINGS[name]
    if settings["format"] == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings["format"],
            bnb_4bit_use_double_quant=settings.get("double_quant", False),
        )
    if "block_size" in settings:
        pytest.skip("transformers does not pass a block size on")
    theirs = AutoModelForCausalLM.from_pretrained(wide, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    files = (runs(name, False), tmp_path / "theirs")
    ours, stock = (load_file(at / "model.safetensors") for at in files)
    assert ours.keys() == stock.keys()
    for key, value in stock.items():
        if "quant_state" in key:
            about = [json.loads(bytes(each[key])) for each in (ours, stock)]
            assert about[0] == about[1]
        else:
            assert torch.equal(ours[key], value), key
            assert ours[key].dtype == value.dtype


def test_a_quantized_checkpoint_can_be_saved_again(
    runs: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    folder = runs("nf4", True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again", save_original_format=False)
    ours, again = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "again"))
    for key, value in again.items():
        if "quant_state" not in key:
            assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", ["nf4", "nf4-nested", "fp4"])
def test_calibrated_codes_lose_less(name: str, runs: Callable[[str, bool], Path]) -> None:
    folder = runs(name, True)
    report = json.loads((Path(f"{folder}.work") / "quantize/report.json").read_text())
    for block in report["layers"]:
        for linear in block:
            assert 0 < linear["error"] < 0.8 * linear["error_nearest"], linear


def test_the_head_and_the_embedding_stay(runs: Callable[[str, bool], Path], wide: Path) -> None:
    folder = runs("nf4", True)
    stored, before = (load_file(at / "model.safetensors") for at in (folder, wide))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(stored[name], before[name])
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["llm_int8_skip_modules"]


def test_ignored_layers_keep_their_dtype(recipe: dict[str, Any], wide: Path) -> None:
    folder = quantized(recipe, wide, format="nf4", ignore=["*.down_proj", "model.layers.0.mlp"])
    stock = decoded(AutoModelForCausalLM.from_pretrained(folder))
    assert len(stock) == 2 * 4 + 2
    assert not any(name.endswith("down_proj") for name in stock)


def test_a_pruned_model_is_quantized(recipe: dict[str, Any], wide: Path) -> None:
    recipe |= {"model": str(wide)}
    recipe["stages"] = [
        {"stage": "prune", "sparsity": 0.2, "structures": ["mlp_neurons"], "round_to": 64},
        {"stage": "quantize", "format": "nf4"},
    ]
    folder = pipeline.run(parse_recipe(recipe))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.intermediate_size == 64
    assert len(decoded(model)) == 2 * len(LINEARS)


def test_from_python(recipe: dict[str, Any]) -> None:
    recipe["stages"] = [{"stage": "quantize", "format": "int8"}]
    model = compress(tiny_model(**WIDE).bfloat16(), tiny_tokenizer(), recipe)
    assert model.is_loaded_in_8bit


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "nf5"}, "unknown format 'nf5'; the valid ones are nf4, fp4, int8, W3A16"),
        ({"format": "nf4", "block_size": 48}, "block_size 48 is none of 32, 64"),
        ({"format": "nf4", "block_size": 128}, "64 inputs are no multiple of block_size 128"),
        ({"format": "int8", "double_quant": True}, "double_quant goes with nf4 and fp4"),
        ({"ignore": ["*.layers.*"]}, "leaves nothing to quantize"),
        ({"ignore": ["*.no_such"]}, "matches no module"),
    ],
)
def test_what_cannot_be(
    settings: dict[str, Any], said: str, recipe: dict[str, Any], wide: Path
) -> None:
    with pytest.raises(RecipeError, match=said.replace("*", r"\*")):
        quantized(recipe, wide, **settings)
    assert not Path(recipe["output"]).exists()


def test_nothing_comes_after(recipe: dict[str, Any]) -> None:
    recipe["stages"] = [{"stage": "quantize"}, {"stage": "refit"}]
    with pytest.raises(RecipeError, match="`quantize` has to be the last"):
        pipeline.run(parse_recipe(recipe))


def test_a_quantized_model_is_no_start(
    recipe: dict[str, Any], runs: Callable[[str, bool], Path]
) -> None:
    recipe |= {"model": str(runs("nf4", True))}
    with pytest.raises(ModelError, match="already quantized"):
        pipeline.run(parse_recipe(recipe))
