"""Pushing over real HTTP to a Hub-shaped server, and loading what was pushed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_compress.checkpoint.hub import push_folder
from hf_compress.errors import CheckpointError
from tests.hub_server import TOKEN, HubState, hub_server
from tests.tiny import random_ids, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PUSH = "import sys; from hf_compress.cli import main; sys.argv[1:1] = ['push']; main()"
LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert len(AutoTokenizer.from_pretrained(sys.argv[1])) == 160
with torch.no_grad():
    logits = model(load_file(sys.argv[2])["ids"]).logits
save_file({"logits": logits}, sys.argv[3])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished checkpoint, and a stray file that must stay at home."""
    folder = tmp_path / "finished"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for name in ("metrics.json", "plan.json", "recipe.yaml"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Card\n")
    (folder / "figures").mkdir()
    (folder / "figures/widths.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "notes.txt").write_text("private")
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[dict[str, str], HubState]]:
    """Environment of a client that talks to the server, and the server's state."""
    with hub_server() as (address, state):
        environment = {
            name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"
        }
        environment |= {
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf-home"),
            "PYTHONPATH": str(ROOT),
        }
        yield environment, state


def client(environment: dict[str, str], code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_pushed_loads_from_the_hub(
    folder: Path, hub: tuple[dict[str, str], HubState], tmp_path: Path
) -> None:
    environment, state = hub
    pushed = client(environment, PUSH, str(folder), "user/small")
    assert pushed.returncode == 0, pushed.stderr
    repo = state.repos["user/small"]
    assert f"/user/small/commit/{repo.sha}" in pushed.stdout
    expected = {"README.md", "metrics.json", "plan.json", "recipe.yaml", "figures/widths.png"}
    assert expected <= set(repo.files)
    assert repo.lfs == {"model.safetensors"}
    assert "notes.txt" not in repo.files

    ids, out = tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"

    save_file({"ids": random_ids(1, 12)}, ids)
    loaded = client(environment, LOAD, "user/small", str(ids), str(out))
    assert loaded.returncode == 0, loaded.stderr
    with torch.no_grad():
        logits = tiny_model()(random_ids(1, 12)).logits
    assert torch.equal(load_file(out)["logits"], logits)

    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Another card\n")
    again = client(environment, PUSH, str(folder), "user/small")
    assert again.returncode == 0, again.stderr
    assert len(repo.commits) == 3
    assert b"Another card" in repo.files["README.md"]


def test_a_wrong_token_is_one_clear_error(
    folder: Path, hub: tuple[dict[str, str], HubState]
) -> None:
    environment, state = hub
    pushed = client({**environment, "HF_TOKEN": "hf_wrong"}, PUSH, str(folder), "user/small")
    assert pushed.returncode == 1
    assert "hf auth login" in pushed.stderr
    assert "Traceback" not in pushed.stderr
    assert not state.repos


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_an_unfinished_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"not a finished checkpoint.*{name}"):
        push_folder(folder, "user/small")


def test_a_pickle_is_refused(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        push_folder(folder, "user/small")
