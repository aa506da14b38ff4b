"""`stage: quantize` in compressed-tensors' format: what stock libraries read is what was chosen.

The traps that the format's docstring names are pinned here, so that a release which closes one
(or opens another) is noticed.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

import hf_compress.pipeline as pipeline
from hf_compress.errors import ModelError, RecipeError
from hf_compress.formats import stored_layout
from hf_compress.formats.compressed_tensors import BITS, Packed
from hf_compress.formats.grid import Codes
from hf_compress.model.blocks import StreamedCheckpoint
from hf_compress.model.loading import load_config
from hf_compress.quantization.targets import find_targets
from hf_compress.recipe import Quantize, parse_recipe
from tests.tiny import WIDE, tiny_model

RUNS: dict[str, dict[str, Any]] = {
    "groups": {"format": "W4A16", "block_size": 32},
    "rows": {"format": "W8A16", "block_size": None, "calibrated": False},
    "mixed": {
        "format": "W4A16",
        "block_size": 32,
        "bits": {"*.down_proj": 8, "re:.*0.mlp.(gate|up)_proj": 3},
        "ignore": ["model.layers.1.self_attn"],
    },
}
IDS = torch.arange(4, 12)[None]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="session")
def runs(quantized_once: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda name: quantized_once(**RUNS[name])


def configuration(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def quantized_names(folder: Path) -> list[str]:
    suffix = ".weight_packed"
    stored = load_file(folder / "model.safetensors")
    return [name.removesuffix(suffix) for name in stored if name.endswith(suffix)]


def ours(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the linear layers of both blocks, as this package reads them."""
    source = StreamedCheckpoint(folder, load_config(folder), torch.bfloat16, torch.device("cpu"))
    found = {}
    for index in range(2):
        with source.block(index) as block:
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    found[f"model.layers.{index}.{name}"] = module.weight.detach()
    return found


def differing(model: PreTrainedModel, wanted: dict[str, torch.Tensor]) -> list[str]:
    """Layers whose weights a model, which has run, holds otherwise."""
    return [
        name
        for name, weight in wanted.items()
        if not torch.equal(model.get_submodule(name).weight, weight)
    ]


def loaded(folder: Path, **settings: Any) -> PreTrainedModel:
    """The model after its first forward pass, at which transformers writes the weights out."""
    model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    with torch.no_grad():
        model(IDS)
    return model


@pytest.mark.parametrize("name", RUNS)
def test_stock_libraries_read_what_was_chosen(name: str, runs: Callable[[str], Path]) -> None:
    wanted = ours(runs(name))
    assert len(wanted) == 14
    assert differing(loaded(runs(name)), wanted) == []


def test_rounding_to_nearest_is_the_library_s(runs: Callable[[str], Path], wide: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(wide)
    config = QuantizationConfig.model_validate(
        {**configuration(runs("rows")), "quantization_status": "initialized"}
    )
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme:
            weight_OI = module.weight.detach()
            scale_O1, zero_O1 = calculate_qparams(
                weight_OI.amin(1, keepdim=True), weight_OI.amax(1, keepdim=True), scheme.weights
            )
            module.weight_scale.data.copy_(scale_O1)
            module.weight_zero_point.data.copy_(zero_O1)
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    stock, stored = model.state_dict(), load_file(runs("rows") / "model.safetensors")
    assert stored.keys() == stock.keys()
    for key, value in stock.items():
        assert torch.equal(stored[key], value), key
        assert stored[key].dtype == value.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_read_as_the_grid_says(
    bits: int, group_size: int | None, dtype: torch.dtype
) -> None:
    layout, generator = Packed(bits, group_size), torch.Generator().manual_seed(bits)
    grid = layout.grid(dtype)
    codes_OI = torch.randint(2**bits, (8, 96), generator=generator).to(torch.uint8)
    scale_OB = torch.rand(8, 96 // grid.columns(96), generator=generator) / 100
    scale_OB[0, 0] = 1e-30  # nothing in float16, and yet no division by zero
    codes = Codes(codes_OI, scale_OB)
    stored = layout.pack(codes, dtype)
    assert torch.equal(layout.unpack(stored, dtype), codes.weight(grid).to(dtype))
    assert (stored["weight_scale"] > 0).all()
    shapes = layout.shapes(8, 96, dtype)
    for found in (stored, layout.nearest(torch.randn(8, 96, generator=generator).to(dtype))):
        assert found.keys() == shapes.keys()
        for key, shape in shapes.items():
            assert (found[key].shape, found[key].dtype) == (shape.shape, shape.dtype), key


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("bits", BITS)
def test_the_nearest_codes_by_hand(bits: int, group_size: int | None) -> None:
    """In bfloat16 throughout, as the library does it; half the range of codes is 7.5 in 4 bits."""
    weight_OI = torch.randn(8, 96, generator=torch.Generator().manual_seed(bits)).bfloat16()
    blocks_OBC = weight_OI.unflatten(1, (-1, group_size or 96))
    scale_OB1 = blocks_OBC.abs().amax(2, keepdim=True) / ((2**bits - 1) / 2)
    half = 2 ** (bits - 1)
    codes_OBC = (blocks_OBC / scale_OB1).round().clamp(-half, half - 1)
    layout = Packed(bits, group_size)
    read_OI = layout.unpack(layout.nearest(weight_OI), torch.bfloat16)
    assert torch.equal(read_OI, (codes_OBC * scale_OB1).flatten(1))


def test_calibrated_codes_lose_less(runs: Callable[[str], Path]) -> None:
    report = json.loads((Path(f"{runs('groups')}.work") / "quantize/report.json").read_text())
    for block in report["layers"]:
        for linear in block:
            assert 0 < linear["error"] < 0.8 * linear["error_nearest"], linear


def test_the_configuration_is_what_servers_expect(runs: Callable[[str], Path]) -> None:
    found = configuration(runs("groups"))
    assert found["quant_method"] == "compressed-tensors"
    assert found["format"] == "pack-quantized"
    assert found["quantization_status"] == "compressed"
    assert found["ignore"] == ["lm_head"]
    (group,) = found["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["format"] == "pack-quantized"
    assert group["input_activations"] is None
    about = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
    assert group["weights"] == {**about, "strategy": "group", "group_size": 32}
    assert configuration(runs("rows"))["config_groups"]["group_0"]["weights"] == {
        **about,
        "num_bits": 8,
        "strategy": "channel",
        "group_size": None,
    }


def test_mixed_bits_list_layers_by_name(runs: Callable[[str], Path]) -> None:
    found = configuration(runs("mixed"))
    bits = {
        name: group["weights"]["num_bits"]
        for group in found["config_groups"].values()
        for name in group["targets"]
    }
    assert sorted(bits) == sorted(quantized_names(runs("mixed")))
    assert all(group["format"] == "pack-quantized" for group in found["config_groups"].values())
    assert {name.rsplit(".", 1)[-1] for name, count in bits.items() if count == 8} == {"down_proj"}
    assert {name for name, count in bits.items() if count == 3} == {
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")
    }
    kept = {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"}
    assert set(found["ignore"]) == kept | {"lm_head"}


@pytest.mark.parametrize("after_forward", [False, True])
def test_a_quantized_checkpoint_can_be_saved_again(
    after_forward: bool, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    load = loaded if after_forward else AutoModelForCausalLM.from_pretrained
    load(runs("mixed")).save_pretrained(tmp_path)
    assert differing(loaded(tmp_path), ours(runs("mixed"))) == []
    # Once it has run, a model is saved as it then is: every weight written out.
    assert bool(quantized_names(tmp_path)) != after_forward


def test_dequantizing_while_loading_needs_one_group(runs: Callable[[str], Path]) -> None:
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    assert differing(loaded(runs("groups"), **how), ours(runs("groups"))) == []
    # With 3 bits among them; 8 and 4 bits it takes for each other and says nothing.
    with pytest.raises(RuntimeError, match="automatic conversion"):
        loaded(runs("mixed"), **how)


def stored_by_the_library(folder: Path, group: dict[str, Any], form: str) -> Path:
    """A tiny model whose linear layers the library itself has rounded and stored in a form."""
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(form)
    model = tiny_model(**WIDE).bfloat16()
    state = model.state_dict()
    for name in [name for name in state if name.endswith("_proj.weight")]:
        found = {"weight": state.pop(name)}
        blocks_OBC = found["weight"].unflatten(1, (-1, 32))
        found["weight_scale"], found["weight_zero_point"] = calculate_qparams(
            blocks_OBC.amin(2), blocks_OBC.amax(2), scheme.weights
        )
        for key, value in compressor.compress(found, scheme).items():
            state[name.removesuffix("weight") + key] = value
    model.config.quantization_config = {
        **Packed(8, 32).configuration(["lm_head"], {}),
        "format": form,
        "config_groups": {"group_0": group},
    }
    model.config.save_pretrained(folder)
    tensors = {name: value.contiguous() for name, value in state.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def group_of(bits: int, symmetric: bool = True, form: str | None = None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}
    return {
        "targets": ["Linear"],
        "weights": {**weights, "symmetric": symmetric, "dynamic": False},
        "format": form,
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_do_not_load(bits: int, tmp_path: Path) -> None:
    """So none are offered, nor read."""
    form = "pack-quantized"
    symmetric = stored_by_the_library(tmp_path, group_of(bits, form=form), form)
    loaded(symmetric)
    assert stored_layout(load_config(symmetric)) == Packed(bits, 32)
    other = stored_by_the_library(tmp_path, group_of(bits, symmetric=False, form=form), form)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loaded(other)
    with pytest.raises(ModelError, match="which is not read"):
        stored_layout(load_config(other))


def test_bytes_load_only_where_the_group_says_so(tmp_path: Path) -> None:
    """So 8 bits are packed as well, which every release takes for the form of such a group."""
    form = "int-quantized"
    for group, lacking in ((group_of(8, form=form), 0), (group_of(8), 2 * 14)):
        folder = stored_by_the_library(tmp_path, group, form)
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert len(info["missing_keys"]) == lacking


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"block_size": 48},
            "64 inputs are no multiple of block_size 48; 32, 64 would do, or null",
        ),
        ({"bits": {"*.q_proj": 5}}, "5 bits a weight are none of 3, 4, 8"),
        ({"bits": {"*.no_such": 8}}, "bits: '*.no_such' matches no module"),
        ({"bits": {"lm_head": 8}}, "'lm_head' matches no linear layer that is quantized"),
        ({"bits": {"*.q_proj": 8, "*.self_attn": 3}}, "'*.q_proj' says 8 and '*.self_attn' says 3"),
        ({"format": "nf4", "bits": {"*.q_proj": 8}}, "bitsandbytes stores all layers"),
        ({"format": "int8", "bits": {"*.q_proj": 4}}, "bitsandbytes stores all layers"),
        ({"ignore": ["*.layers.*"]}, "leaves nothing to quantize"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        find_targets(tiny_model(**WIDE), Quantize(**{"format": "W4A16", **settings}))
    assert said in str(error.value)


def test_widths_that_fill_no_words() -> None:
    with pytest.raises(RecipeError, match="48 inputs are no multiple of 32"):
        find_targets(tiny_model(**{**WIDE, "intermediate_size": 48}), Quantize(format="W3A16"))


def test_transposed_layers_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"gpt2 has \(Conv1D\); nf4, fp4 and int8 do"):
        find_targets(tiny_model("gpt2"), Quantize(format="W4A16", block_size=None))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors.compressors.pack_quantized", None)
    with pytest.raises(RecipeError, match=r'pip install "hf-compress\[compressed-tensors\]"'):
        find_targets(tiny_model(**WIDE), Quantize(format="W4A16"))


@pytest.mark.parametrize(
    ("bits", "warned"), [({"*.q_proj": 8}, True), ({"re:.*(q|k|v)_proj": 8}, False)]
)
def test_layers_that_servers_fuse(
    bits: dict[str, int], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        find_targets(tiny_model(**WIDE), Quantize(format="W4A16", bits=bits))
    assert ("which computes them as one layer" in caplog.text) == warned


def test_layers_that_were_cut_to_differ(recipe: dict[str, Any], wide: Path, tmp_path: Path) -> None:
    """Loads with the modelling file beside the weights, in the run's own check too."""
    widths = {"intermediate_size": 96, "num_key_value_heads": 4}
    layers = [widths, {**widths, "intermediate_size": 64, "skip": ["attention"]}]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"model_type": "llama", "layers": layers}))
    recipe |= {"model": str(wide)}
    recipe["stages"] = [
        {"stage": "prune", "plan": str(plan)},
        {"stage": "quantize", **RUNS["groups"], "bits": {"*.down_proj": 8}},
    ]
    folder = pipeline.run(parse_recipe(recipe))
    assert len(quantized_names(folder)) == 7 + 3
    assert differing(loaded(folder, trust_remote_code=True), ours(folder)) == []
