"""What the streaming writer leaves on disk is what safetensors itself would have written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_compress.checkpoint import ShardWriter
from hf_compress.errors import CheckpointError
from tests.tiny import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_is_the_one_that_safetensors_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model("qwen2").to(dtype)
    writer = ShardWriter(tmp_path, model)
    stored = set()
    for name, tensor in reversed(model.state_dict().items()):
        writer.add(name, tensor)
    writer.close()
    written = load_file(tmp_path / "model.safetensors")
    for name, tensor in written.items():
        assert torch.equal(tensor, model.state_dict()[name])
        assert tensor.dtype == dtype
        stored.add(name)
    assert stored | {"lm_head.weight"} == set(model.state_dict())
    save_file(written, tmp_path / "other.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(
        (tmp_path / "other.safetensors").stat().st_size, abs=4096
    )


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = tiny_model("llama")
    writer = ShardWriter(tmp_path, model, "60KB")
    for name, tensor in model.state_dict().items():
        writer.add(name, tensor)
    writer.close()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = type(model).from_pretrained(_with_config(tmp_path, model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_mixed_dtypes_scalars_and_what_is_not_contiguous(tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    model.register_buffer("steps", torch.tensor(7))
    model.register_buffer("mask", torch.tensor([[True, False], [False, True], [True, True]]).T)
    model.register_buffer("scale", torch.rand(3))
    writer = ShardWriter(tmp_path, model)
    for name, tensor in model.state_dict().items():
        writer.add(name, tensor)
    writer.close()
    written = load_file(tmp_path / "model.safetensors")
    for name in ("steps", "mask", "scale", "model.norm.weight"):
        assert torch.equal(written[name], model.state_dict()[name])
        assert written[name].dtype == model.state_dict()[name].dtype


def test_a_tensor_that_is_missing_or_of_another_shape(tmp_path: Path) -> None:
    model = tiny_model("llama")
    writer = ShardWriter(tmp_path, model)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has the shape \(1,\)"):
        writer.add("model.norm.weight", torch.zeros(1))
    for name, tensor in model.state_dict().items():
        if name != "model.norm.weight":
            writer.add(name, tensor)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, as model\.norm\.weight"):
        writer.close()


def _with_config(folder: Path, model: torch.nn.Module) -> Path:
    model.config.save_pretrained(folder)  # type: ignore[union-attr,operator]
    return folder
