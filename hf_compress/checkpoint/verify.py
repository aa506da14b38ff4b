"""The gate after every save: a fresh process loads what was written and must agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_compress.errors import CheckpointError
from hf_compress.model.layers import PREFIX

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Norm of the difference of logits over the norm of the logits: what another order of the same
sums may cost in a dtype (SmolLM2-135M in bfloat16 against float32: .017, and .032 of the largest
logit where it differs most). A wrong tie, width or scale costs far more."""


@dataclass(frozen=True)
class VerificationResult:
    """What the fresh process measured."""

    relative_logit_error: float
    tolerance: float
    generated_tokens: int
    parameters: int


def verify(
    folder: Path,
    ids_NL: torch.Tensor,
    logits_NLV: torch.Tensor,
    device: torch.device,
    auto_class: str = "AutoModelForCausalLM",
    tolerance: float | None = None,
) -> VerificationResult:
    """Load `folder` in a process without hf_compress; compare logits; generate 8 tokens where
    `auto_class`, the name of the class that loads it, is that of causal models.

    `tolerance` stands in the place of the dtype's where the library computes otherwise.

    Code in the folder is run only where our own writer has just put it there.

    Raises:
        CheckpointError: it does not load, or the logits differ by more than the tolerance.
    """
    tolerance = tolerance or TOLERANCE[logits_NLV.dtype]
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference.safetensors"
        tensors = {"ids": ids_NL, "logits": logits_NLV.float()}
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, reference)
        script = Path(__file__).with_name("fresh_load.py")
        arguments = (script, folder, reference, device, auto_class, int(_has_our_code(folder)))
        run = subprocess.run(
            [sys.executable, "-I", *map(str, arguments)],
            capture_output=True,
            text=True,
            # The code is imported from a copy, which goes with the scratch folder.
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch},
            check=False,
        )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if run.returncode or not lines:
        raise CheckpointError(
            f"the saved checkpoint does not load in a fresh process:\n{run.stderr[-2000:]}"
        )
    result = json.loads(lines[-1].removeprefix("RESULT "))
    if result.pop("imported_hf_compress"):
        raise CheckpointError("the fresh process imported hf_compress; the check proves nothing")
    # `not <=` and not `>`: NaN must fail.
    if not result["relative_logit_error"] <= tolerance:
        raise CheckpointError(
            f"the saved checkpoint computes other logits than the model in memory: relative error "
            f"{result['relative_logit_error']:.3g}, tolerated {tolerance:g}. It was not kept"
        )
    return VerificationResult(tolerance=tolerance, **result)


def _has_our_code(folder: Path) -> bool:
    """Whether the layers differ, and a modelling file goes with the weights."""
    config = json.loads((folder / "config.json").read_bytes())
    return str(config["model_type"]).startswith(PREFIX)
