"""The command line as a user meets it: evaluate, launch, Ctrl-C, places that cannot be written."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_compress import pipeline
from hf_compress.cli import WORLD_SIZES, main
from hf_compress.data.windows import load_evaluation_windows, load_windows
from hf_compress.recipe import Data, Evaluation, load_recipe
from hf_compress.report import load_metrics, summary_lines
from hf_compress.workspace import digest_files
from tests.tiny import tiny_model, tiny_text, tiny_tokenizer

ROOT = Path(__file__).parents[1]
COMPLETE = {"config.json", "recipe.yaml", "plan.json", "metrics.json", "README.md"}
Call = Callable[..., tuple[int, str, str]]


def write_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """A recipe and its two texts in `folder`; `changes` replace its keys."""
    for name, seed in (("calibration", 1), ("evaluation", 2)):
        (folder / f"{name}.txt").write_text(tiny_text(4000, seed))

    def text(name: str, num_samples: int) -> dict[str, Any]:
        path = str(folder / f"{name}.txt")
        return {"source": path, "num_samples": num_samples, "max_seq_length": 32}

    recipe = {
        "model": str(model),
        "output": str(folder / "out"),
        "data": {
            "calibration": text("calibration", 64),
            "evaluation": text("evaluation", 8),
            "num_fitness_samples": 4,
        },
        "stages": [{"stage": "prune", "sparsity": 0.3, "round_to": 8}],
        "evaluate": {"speed": False},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run."""
    return pipeline.run(load_recipe(write_recipe(tmp_path_factory.mktemp("run"), checkpoint)))


@pytest.fixture
def moved(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, whose calibration text is nowhere."""
    copy = tmp_path / "moved"
    shutil.copytree(finished, copy)
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("calibration.txt", "gone.txt"))
    return copy


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`hf-compress ...` in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capsys.readouterr()

    return run


def start(*arguments: object, **changes: str) -> subprocess.Popen[str]:
    """`python -m ...` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes},
        # In the background of a shell tests are told to ignore it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


BAR = re.compile(r"block/s\]|s/block\]|\?block")


def errors(stderr: str) -> list[str]:
    """Lines on stderr other than progress bars."""
    return [line for line in stderr.splitlines() if line.strip() and not BAR.search(line)]


def written_at(workspace: Path) -> dict[Path, int]:
    """When each finished step was made."""
    return {path: path.stat().st_mtime_ns for path in workspace.glob("*/manifest.json")}


def test_evaluate_measures_what_the_run_measured_and_changes_nothing(
    finished: Path, tmp_path: Path, call: Call
) -> None:
    before = digest_files(finished)
    target = tmp_path / "again.json"
    status, out, _ = call("evaluate", finished, "--json", target)
    assert status == 0
    assert digest_files(finished) == before
    stored, measured = load_metrics(finished / "metrics.json"), load_metrics(target)
    assert out.splitlines() == summary_lines(measured)
    assert measured.before.perplexity == pytest.approx(stored.before.perplexity, rel=1e-4)
    assert measured.after.perplexity == pytest.approx(stored.after.perplexity, rel=1e-4)
    assert measured.comparison.kl == pytest.approx(stored.comparison.kl, rel=1e-4)
    kept = {"pruning", "layers", "verification", "seconds", "hf_compress_version", "base_model"}
    assert measured.model_dump(include=kept) == stored.model_dump(include=kept)


def test_evaluate_on_another_text(finished: Path, tmp_path: Path, call: Call) -> None:
    before = digest_files(finished)
    other, target = tmp_path / "other.txt", tmp_path / "other.json"
    other.write_text(tiny_text(3000, 7))
    options = ("--num-samples", 6, "--max-seq-length", 40, "--speed", "--json", target)
    status, _, stderr = call("evaluate", finished, "--source", other, *options)
    assert status == 0, stderr
    stored, measured = load_metrics(finished / "metrics.json"), load_metrics(target)
    assert measured.comparison.evaluation_source == "other.txt"
    assert (measured.comparison.num_windows, measured.comparison.max_seq_length) == (6, 40)
    assert measured.before.perplexity != pytest.approx(stored.before.perplexity, rel=1e-4)
    assert measured.comparison.kl != pytest.approx(stored.comparison.kl, rel=1e-4)
    assert measured.after.decode_tokens_per_second > 0
    assert digest_files(finished) == before


def test_the_calibration_text_need_not_be_at_hand_unless_another_text_must_avoid_it(
    moved: Path, tmp_path: Path, call: Call
) -> None:
    target = tmp_path / "again.json"
    assert call("evaluate", moved, "--json", target)[0] == 0
    stored, measured = load_metrics(moved / "metrics.json"), load_metrics(target)
    assert measured.comparison.kl == pytest.approx(stored.comparison.kl, rel=1e-4)
    assert measured.comparison.calibration_source == "calibration.txt"
    status, _, stderr = call("evaluate", moved, "--num-samples", 4)
    assert status == 1
    assert "leave out what the run calibrated on" in stderr
    assert "gone.txt" in stderr


@pytest.mark.parametrize("length", [32, 24])
def test_another_text_shares_no_token_with_what_was_calibrated_on(
    finished: Path, length: int
) -> None:
    recipe = load_recipe(finished / "recipe.yaml")
    source = recipe.data.calibration.source
    other = Evaluation(source=source, num_samples=20, max_seq_length=length)
    windows = load_evaluation_windows(recipe.data, tiny_tokenizer(), recipe.seed, other)
    assert windows.shape == (20, length)
    stored = load_file(finished.with_name("out.work") / "windows" / "windows.safetensors")

    def runs(windows_NL: torch.Tensor) -> set[tuple[int, ...]]:
        """Six tokens in a row, which random text does not repeat."""
        return {tuple(run) for run in windows_NL.unfold(1, 6, 1).flatten(0, 1).tolist()}

    calibrated_on = runs(stored["calibration"]) | runs(stored["fitness"])
    text = tiny_tokenizer()(Path(source).read_text(), return_tensors="pt")["input_ids"]
    assert calibrated_on < runs(text)
    assert not runs(windows) & calibrated_on


@pytest.mark.parametrize("calibration", ["self", "other.txt", "text.txt", "some/dataset"])
@pytest.mark.parametrize("evaluation", ["text.txt", "some/dataset"])
def test_the_evaluation_windows_alone_are_those_of_a_run(
    calibration: str, evaluation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(tiny_text(3000, 1))
    Path("other.txt").write_text(tiny_text(3000, 2))
    rows = [{"text": tiny_text(50, seed)} for seed in range(400)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: iter(rows))
    size = {"max_seq_length": 16, "num_samples": 10}
    data = Data.model_validate(
        {
            "calibration": {"source": calibration, **size},
            "evaluation": {"source": evaluation, **size},
            "num_fitness_samples": 50,
        }
    )

    def sample(num: int, length: int) -> torch.Tensor:
        return torch.randint(4, 100, (num, length), generator=torch.Generator().manual_seed(0))

    whole = load_windows(data, tiny_tokenizer(), 0, sample=sample)
    alone = load_evaluation_windows(data, tiny_tokenizer(), 0)
    assert torch.equal(alone, whole.evaluation)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "no/such-model-here"], ["no/such-model-here", "--model"]),
        (["--source", "self"], ["cannot be `self`"]),
        (["--source", "missing.txt"], ["missing.txt"]),
        (["--num-samples", "0"], ["num_samples", "greater than or equal to 1"]),
        (["--dtype", "int3"], ["dtype", "int3"]),
        (["--json", __file__], [__file__, "not overwritten"]),
        (["--json", "no-folder/metrics.json"], ["no-folder", "does not exist"]),
    ],
)
def test_what_evaluate_refuses(
    finished: Path, options: list[str], words: list[str], call: Call
) -> None:
    status, out, stderr = call("evaluate", finished, *options)
    assert (status, out) == (1, "")
    assert stderr.startswith("error: ")
    assert all(word in stderr for word in words), stderr


def test_evaluate_refuses_a_folder_that_is_no_output(
    finished: Path, checkpoint: Path, tmp_path: Path, call: Call
) -> None:
    for folder, what in (
        (tmp_path / "nowhere", "is not a folder"),
        (checkpoint, "holds no recipe.yaml"),
    ):
        status, _, stderr = call("evaluate", folder)
        assert status == 1
        assert str(folder) in stderr and what in stderr
        assert "the output folder of a finished run" in stderr
    inside = finished / "more.json"
    assert "never changes" in call("evaluate", finished, "--json", inside)[2]
    assert not inside.exists()


def test_evaluate_refuses_a_dense_model_with_other_tokens(
    finished: Path, tmp_path: Path, call: Call
) -> None:
    tiny_model("llama", vocab_size=192).save_pretrained(tmp_path / "wider")
    tiny_tokenizer().save_pretrained(tmp_path / "wider")
    status, _, stderr = call("evaluate", finished, "--model", tmp_path / "wider")
    assert status == 1
    assert "wider has other tokens" in stderr


def test_accelerate_launch(checkpoint: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, checkpoint)
    launch = ("accelerate.commands.launch", "--cpu", "--num_processes", 1)
    process = start(*launch, "-m", "hf_compress", "run", recipe)
    out, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} >= COMPLETE
    assert list((tmp_path / "out").glob("*.safetensors"))
    assert f"compressed model: {tmp_path / 'out'}" in out


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_several_processes_are_refused(
    name: str, checkpoint: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "2")
    status, _, stderr = call("run", write_recipe(tmp_path, checkpoint))
    assert status == 1
    (line,) = stderr.splitlines()
    assert line.startswith("error: launched with 2 processes")
    assert "--num_processes 1" in line
    assert not (tmp_path / "out.work").exists()


def test_torchrun_with_two_processes_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, checkpoint)
    torchrun = ("torch.distributed.run", "--nproc_per_node", 2, "--master_port", 0)
    process = start(*torchrun, "-m", "hf_compress", "run", recipe)
    _, stderr = process.communicate()
    assert process.returncode == 1
    refused = {line for line in stderr.splitlines() if line.startswith("error: ")}
    assert len(refused) == 1
    assert "launched with 2 processes" in refused.pop()
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_ctrl_c_leaves_nothing_half_done_and_the_same_command_goes_on(
    checkpoint: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, checkpoint)
    # Text for seconds of calibration and pruning; the signals come as soon as these begin.
    (tmp_path / "calibration.txt").write_text(tiny_text(150_000, 1))
    changed = yaml.safe_load(recipe.read_text())
    changed["data"]["calibration"] |= {"num_samples": 4000}
    changed["stages"][0]["recollect"] = False
    recipe.write_text(yaml.safe_dump(changed))
    work, written = tmp_path / "out.work", {}
    for step, done in (("calibrate", {"windows"}), ("prune", {"windows", "calibrate"})):
        process = start("hf_compress", "run", recipe)
        while process.poll() is None and not list(work.glob(f".{step}.incomplete-*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        assert process.returncode == 130, stderr
        assert errors(stderr) == ["interrupted; run the same command again to go on"]
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))
        # On a very slow machine the signal may come one step later.
        steps = {path.name for path in work.iterdir()}
        assert steps in (done, done | {step})
        assert all(work.joinpath(name, "manifest.json").is_file() for name in steps)
        assert written.items() <= written_at(work).items()
        written = written_at(work)

    process = start("hf_compress", "run", recipe)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} >= COMPLETE
    assert written.items() <= written_at(work).items()


@pytest.mark.parametrize("place", ["a-file/out", "/proc/hf_compress-out", "/sys/hf_compress-out"])
def test_an_output_that_cannot_be_written_is_one_clear_line(
    place: str, checkpoint: Path, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "a-file").write_text("not a folder")
    output = tmp_path / place
    if output.is_absolute() and not output.parent.exists():
        pytest.skip(f"no {output.parent} here")
    status, _, stderr = call("run", write_recipe(tmp_path, checkpoint, output=str(output)))
    assert status == 1
    (line,) = errors(stderr)
    assert line.startswith(f"error: cannot write {output}")
    assert "choose another output" in line
    assert not output.exists()
