"""Pushing to the Hub over real HTTP, and loading from there as a user would.

The clients run in processes of their own: HF_ENDPOINT is read when huggingface_hub is imported.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_compress.checkpoint.hub import push_folder
from hf_compress.errors import CheckpointError
from tests import hub_server
from tests.hub_server import Commit, HubServer
from tests.tiny import random_ids, tiny_model, tiny_text, tiny_tokenizer

ROOT = Path(__file__).parents[2]
TOKEN, OTHER_TOKEN = "hf_of_ada", "hf_of_grace"
REPO = "ada/smaller"
PUSH = """
import json, sys
from pathlib import Path
from hf_compress.checkpoint.hub import push_folder
from hf_compress.errors import CheckpointError

answers = {}
for name, call in json.load(sys.stdin).items():
    try:
        answers[name] = push_folder(Path(call.pop("folder")), **call)
    except CheckpointError as error:
        answers[name] = f"error: {error}"
print(json.dumps(answers))
"""
LOAD = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

call = json.load(sys.stdin)
ids = load_file(call["ids"])["ids"]
logits = {}
for revision in call["revisions"]:
    model = AutoModelForCausalLM.from_pretrained(call["repo_id"], revision=revision).eval()
    with torch.no_grad():
        logits[revision] = model(ids).logits.contiguous()
save_file(logits, call["logits"])
print(json.dumps(AutoTokenizer.from_pretrained(call["repo_id"])(call["text"])["input_ids"]))
"""


@dataclass
class Pushed:
    hub: HubServer
    folders: dict[str, Path]
    answers: dict[str, str]

    def commit(self, push: str) -> Commit:
        """The commit whose URL a push returned."""
        commits = [commit for repo in self.hub.repos.values() for commit in repo.commits]
        (found,) = (c for c in commits if self.answers[push].endswith(f"/commit/{c.oid}"))
        return found


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer({TOKEN: "ada", OTHER_TOKEN: "grace"}) as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Pushed:
    """Every push of this file, in this order, by one client."""
    scratch = tmp_path_factory.mktemp("hub")
    folders = {
        "sharded": finished(scratch / "sharded", max_shard_size="60KB"),
        "changed card": finished(scratch / "changed", max_shard_size="60KB"),
        "single": finished(scratch / "single"),
        "bad card": finished(scratch / "bad"),
    }
    with (folders["changed card"] / "README.md").open("a") as card:
        card.write("\nA line more.\n")
    (folders["bad card"] / "README.md").write_text("---\nlicense: [open\n---\n# Bad\n")
    to_repo = {name: {"folder": str(path), "repo_id": REPO} for name, path in folders.items()}
    changed = to_repo["changed card"]
    calls = {
        "first": {**to_repo["sharded"], "private": True, "commit_message": "First"},
        "changed card": changed,
        "unchanged": changed,
        "branch": {**changed, "revision": "four/bits"},
        "pull request": {**to_repo["single"], "create_pr": True},
        "single": to_repo["single"],
        "bare name": {**changed, "repo_id": "bare"},
        "wrong token": {**changed, "token": "hf_wrong"},
        "other namespace": {**changed, "repo_id": "grace/smaller"},
        "bad name": {**changed, "repo_id": "ada/smaller/still"},
        "bad card": to_repo["bad card"],
    }
    return Pushed(hub, folders, json.loads(client(hub, scratch, PUSH, calls)))


def finished(folder: Path, **how: Any) -> Path:
    """A checkpoint as a run leaves it, and files that must stay at home."""
    tiny_model("llama").save_pretrained(folder, **how)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Smaller\n")
    (folder / "recipe.yaml").write_text("model: tiny\n")
    for name in ("plan.json", "metrics.json"):
        (folder / name).write_text(json.dumps({"is": name}))
    (folder / "figures").mkdir()
    (folder / "figures" / "widths.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (folder / "notes.txt").write_text("private")
    (folder / ".hidden.json").write_text("{}")
    (folder / "old").mkdir()
    shutil.copy(folder / "config.json", folder / "old" / "config.json")
    return folder


STAY = {"notes.txt", ".hidden.json", "old/config.json"}


def client(hub: HubServer, scratch: Path, script: str, call: Any) -> str:
    """What a script prints that runs with the Hub at `hub` and finds `call` on its stdin."""
    theirs = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(scratch / "home"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(call),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=inherited | environment,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


def on_disk(folder: Path) -> dict[str, bytes]:
    """What of a folder should stand in the repository."""
    files = (path for path in folder.rglob("*") if path.is_file())
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: value for name, value in content.items() if name not in STAY}


def in_commit(commit: Commit) -> dict[str, bytes]:
    stored = {name: file.content for name, file in commit.files.items()}
    del stored[".gitattributes"]
    return stored


@pytest.mark.parametrize(
    ("push", "folder"),
    [("first", "sharded"), ("changed card", "changed card"), ("single", "single")],
)
def test_the_commit_holds_exactly_the_checkpoint(pushed: Pushed, push: str, folder: str) -> None:
    """With `single`: no shard and no index of the earlier pushes is left beside it."""
    stored = in_commit(pushed.commit(push))
    assert {"README.md", "recipe.yaml", "plan.json", "metrics.json"} < stored.keys()
    assert {"config.json", "generation_config.json", "tokenizer.json"} < stored.keys()
    assert "figures/widths.png" in stored
    assert stored == on_disk(pushed.folders[folder])


def test_weights_take_the_lfs_route_and_go_up_once(pushed: Pushed) -> None:
    files = pushed.commit("first").files
    weights = {name for name in files if name.endswith(".safetensors")}
    assert len(weights) > 1
    assert {name for name, file in files.items() if file.lfs} == weights | {"figures/widths.png"}
    sent = [line for line in pushed.hub.requests if line.startswith("PUT ")]
    assert len(sent) == len(set(sent)) == len(pushed.hub.lfs)


def test_pushing_again_commits_what_changed_and_nothing_otherwise(pushed: Pushed) -> None:
    messages = [commit.message for commit in pushed.hub.repos[REPO].commits[:3]]
    assert messages == ["initial commit", "First", "Compressed with hf_compress"]
    first, second = in_commit(pushed.commit("first")), in_commit(pushed.commit("changed card"))
    assert {name for name in first if first[name] != second[name]} == {"README.md"}
    assert pushed.answers["unchanged"] == pushed.answers["changed card"]


def test_branches_pull_requests_and_names_without_namespace(pushed: Pushed) -> None:
    repo = pushed.hub.repos[REPO]
    assert repo.private
    assert repo.branches["four/bits"] == pushed.commit("branch")
    assert repo.branches["refs/pr/1"] == pushed.commit("pull request")
    assert repo.branches["main"] == pushed.commit("single")
    # The pull request removes the shards that its weights replace; main keeps its own.
    assert in_commit(repo.branches["refs/pr/1"]) == on_disk(pushed.folders["single"])
    assert pushed.hub.repos["ada/bare"].branches["main"] == pushed.commit("bare name")


def test_the_server_refuses_strangers_and_damaged_objects() -> None:
    """Otherwise the tests above would prove little."""
    body = json.dumps({"name": "stranger", "organization": "ada"}).encode()
    address = f"/storage/{hashlib.sha256(b'weights').hexdigest()}?size=7"
    with HubServer({TOKEN: "ada"}) as hub:
        assert status(hub, "POST", "/api/repos/create", body) == 401
        assert status(hub, "PUT", address, b"weights") == 403
        signed = f"{address}&signature={hub.signature}"
        assert status(hub, "PUT", signed, b"weightz") == 400
        assert status(hub, "PUT", signed, b"weight") == 400
        assert hub.lfs == {}
        assert status(hub, "PUT", signed, b"weights") == 200
        assert hub.lfs[hashlib.sha256(b"weights").hexdigest()] == b"weights"


def status(hub: HubServer, method: str, address: str, body: bytes) -> int:
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    connection.request(method, address, body)
    answer = connection.getresponse()
    connection.close()
    return answer.status


def test_only_known_routes_were_asked_for(pushed: Pushed) -> None:
    assert pushed.hub.unknown == []


@pytest.mark.parametrize(
    ("push", "words"),
    [
        ("wrong token", ["ada/smaller", "401", "hf auth login", "HF_TOKEN"]),
        ("other namespace", ["grace/smaller", "403", "write"]),
        ("bad name", ["ada/smaller/still", "not a repository name", "user/name"]),
        ("bad card", ["ada/smaller", "Invalid metadata in README.md"]),
    ],
)
def test_a_refused_push_is_one_clear_error(pushed: Pushed, push: str, words: list[str]) -> None:
    answer = pushed.answers[push]
    assert answer.startswith("error: ")
    assert [word for word in words if word not in answer] == []
    assert set(pushed.hub.repos) == {REPO, "ada/bare"}


def test_a_user_loads_the_same_model_and_tokenizer(pushed: Pushed, tmp_path: Path) -> None:
    """From `main` (one file) and from the first commit (shards): bit-equal logits."""
    ids, logits = tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"
    windows_NL, text = random_ids(2, 16), tiny_text(20, seed=3)
    save_file({"ids": windows_NL}, ids)
    revisions = ["main", pushed.commit("first").oid]
    call = {
        "repo_id": REPO,
        "revisions": revisions,
        "ids": str(ids),
        "logits": str(logits),
        "text": text,
    }
    tokens = json.loads(client(pushed.hub, tmp_path, LOAD, call))
    assert tokens == tiny_tokenizer()(text)["input_ids"]
    local = AutoModelForCausalLM.from_pretrained(pushed.folders["single"]).eval()
    with torch.no_grad():
        expected_NLV = local(windows_NL).logits
    loaded = load_file(logits)
    for revision in revisions:
        assert torch.equal(loaded[revision], expected_NLV)


@pytest.fixture
def placeholder(tmp_path: Path) -> Path:
    """The least that passes for a finished checkpoint."""
    for name in ("config.json", "README.md"):
        (tmp_path / name).touch()
    save_file({"weight": torch.zeros(8)}, tmp_path / "model.safetensors")
    return tmp_path


def lose(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def index(text: str) -> Any:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose("config.json"), "lacks config.json"),
        (lose("README.md"), "lacks README.md"),
        (lose("model.safetensors"), "holds no model.safetensors"),
        (
            index('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'),
            "absent: model-2.safetensors",
        ),
        (index('{"weight_'), "index.json is truncated or no shard index"),
        (index('{"metadata": {}}'), "index.json is truncated or no shard index"),
        (truncate, "model.safetensors is truncated"),
        (lambda folder: (folder / "training_args.BIN").touch(), "pickles.*training_args.BIN"),
    ],
)
def test_an_unfinished_folder_is_refused_before_anything_is_sent(
    placeholder: Path, damage: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    damage(placeholder)
    with pytest.raises(CheckpointError, match=words):
        push_folder(placeholder, REPO)


def test_offline_mode_is_named(placeholder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set; unset it"):
        push_folder(placeholder, REPO)


def test_an_upload_that_stops_is_named_and_commits_nothing(
    placeholder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise hub_server.Refused(400, "storage is full")

    routes = [(verb, path, full if verb == "PUT" else do) for verb, path, do in hub_server.ROUTES]
    monkeypatch.setattr(hub_server, "ROUTES", routes)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    (placeholder / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    with HubServer({TOKEN: "ada"}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        with pytest.raises(CheckpointError, match=r"upload stopped.*storage is full"):
            push_folder(placeholder, REPO, token=TOKEN)
    assert [commit.message for commit in hub.repos[REPO].commits] == ["initial commit"]


def test_a_hub_out_of_reach_is_named(placeholder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    with pytest.raises(CheckpointError, match=f"{url} is not reached.*HF_ENDPOINT"):
        push_folder(placeholder, REPO, token=TOKEN)
