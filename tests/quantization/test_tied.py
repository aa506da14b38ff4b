"""A head that is tied to the embedding is stored with it, once, and what is known of storing
the two in few bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_compress.formats.compressed_tensors import Packed
from tests.tiny import WIDE, tiny_model

IDS = torch.arange(4, 12)[None]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="session")
def tied(make_wide: Callable[..., Path]) -> Path:
    return make_wide(tie_word_embeddings=True)


def bytes_of_tensors(file: Path) -> int:
    """Size of a safetensors file without its header."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


@pytest.mark.parametrize("form", ["nf4", "W4A16"])
def test_a_tied_tensor_is_stored_once(
    form: str, tied: Path, quantized_once: Callable[..., Path]
) -> None:
    folder = quantized_once(tied, format=form, calibrated=False)
    model = AutoModelForCausalLM.from_pretrained(tied)
    embedding = model.get_input_embeddings().weight.numel()
    linear = sum(
        module.weight.numel()
        for module in model.model.modules()
        if isinstance(module, torch.nn.Linear)
    )
    rest = sum(p.numel() for p in model.parameters()) - embedding - linear
    scales = linear // 64 * (4 if form == "nf4" else 2)
    # Of each of 14 weights: its shape; in nf4 its levels, and its state as JSON.
    about = bytes_of_tensors(folder / "model.safetensors") - (
        2 * embedding + 2 * rest + linear // 2 + scales
    )
    assert 14 * 16 <= about < 14 * 200
    assert about < embedding


def stored(folder: Path, form: str, names: list[str]) -> dict[str, torch.Tensor]:
    """A tied model whose embedding, or also its head, the library has stored in 8 bits; what is
    to be read of them."""
    model = tiny_model(**WIDE, tie_word_embeddings=True).bfloat16()
    state = {name: value for name, value in model.state_dict().items() if HEAD not in name}
    group = {**Packed(8)._group(names), "format": form}
    scheme = QuantizationScheme.model_validate(group)
    weight_OI = state.pop(f"{EMBEDDING}.weight")
    scale_O1, _ = calculate_qparams(
        weight_OI.amin(1, keepdim=True), weight_OI.amax(1, keepdim=True), scheme.weights
    )
    compressor = BaseCompressor.get_value_from_registry(form)
    parts = compressor.compress({"weight": weight_OI, "weight_scale": scale_O1}, scheme)
    for name in names:
        state |= {f"{name}.{part}": value.clone() for part, value in parts.items()}
    if form == "int-quantized":
        # The codes are tied as weights are; scales are not.
        state.pop(f"{HEAD}.weight", None)
    model.config.quantization_config = Packed(8).configuration([], {}) | {
        "format": form,
        "config_groups": {"group_0": group},
    }
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return {name: compressor.decompress(parts, scheme)["weight"] for name in names}


def test_bytes_of_a_tied_embedding_load(tmp_path: Path) -> None:
    wanted = stored(tmp_path, "int-quantized", [EMBEDDING, HEAD])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model(IDS)
    for name, weight in wanted.items():
        assert torch.equal(model.get_submodule(name).weight, weight), name


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("pack-quantized", [EMBEDDING]),
        ("pack-quantized", [EMBEDDING, HEAD]),
        ("int-quantized", [EMBEDDING]),
    ],
)
def test_other_forms_of_a_tied_embedding_do_not(
    form: str, names: list[str], tmp_path: Path
) -> None:
    stored(tmp_path, form, names)
    with pytest.raises((AttributeError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)(IDS)
