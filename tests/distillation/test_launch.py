"""Launched in parallel, several processes train as one with more accumulation does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("launched.py")
ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
"""Relative; sums of gradients over processes are in another order than over batches."""


def launched(folder: Path, processes: int, size: int, accumulation: int) -> dict[str, Any]:
    folder.mkdir()
    # What `accelerate launch` runs underneath; on CPUs by itself it asks for mpirun instead.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes)]
    run = subprocess.run(
        [*command, str(SCRIPT), str(folder), str(size), str(accumulation)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "curve.json").read_text())


def test_two_processes_give_the_curve_of_one_with_doubled_accumulation(tmp_path: Path) -> None:
    one = launched(tmp_path / "one", 1, size=2, accumulation=2)
    two = launched(tmp_path / "two", 2, size=2, accumulation=1)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["losses"]) == 6 and len(one["kl"]) == 2 and len(one["windows"]) == 7
    for name in ("losses", "kl", "windows"):
        assert two[name] == pytest.approx(one[name], rel=TOLERANCE), name
