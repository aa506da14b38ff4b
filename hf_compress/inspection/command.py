"""`hf-compress inspect`: from a model's name to an inspection, and to its files."""

from __future__ import annotations

from pathlib import Path

from hf_compress.data.masking import masked_tokens
from hf_compress.data.windows import load_evaluation_windows
from hf_compress.errors import CheckpointError, ModelError, RecipeError
from hf_compress.inspection.inspector import DUPLICATE_COSINE, inspect_model
from hf_compress.inspection.plot import plot_inspection
from hf_compress.inspection.results import Inspection
from hf_compress.model.blocks import StreamedCheckpoint
from hf_compress.model.families import family_of, require_positions
from hf_compress.model.loading import (
    load_config,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_folder,
)
from hf_compress.recipe import parse_recipe


def inspect_checkpoint(
    model: str,
    *,
    source: str = "python-docs",
    num_samples: int = 16,
    max_seq_length: int = 512,
    dtype: str = "auto",
    device: str = "auto",
    duplicate_cosine: float = DUPLICATE_COSINE,
) -> Inspection:
    """Inspect a checkpoint, streamed block by block.

    Args:
        model: a Hub id, or a folder with a checkpoint; it is only read.
        source: text to read it on, as a recipe's `data.evaluation.source`.
        num_samples: windows of the text.
        max_seq_length: tokens in a window.
        dtype, device: as in a recipe.
        duplicate_cosine: see `inspect_model`.

    Raises:
        CompressionError: a value, model or text that does not serve.
    """
    # A recipe of one harmless stage: its checks and its errors serve here as well.
    evaluation = {"source": source, "num_samples": num_samples, "max_seq_length": max_seq_length}
    recipe = parse_recipe(
        {
            "model": model,
            "output": "none",
            "dtype": dtype,
            "device": device,
            "data": {"evaluation": evaluation},
            "stages": [{"stage": "calibrate"}],
        }
    )
    folder, text = resolve_folder(model), Path(source).expanduser()
    config = load_config(folder)
    require_positions(config, max_seq_length)
    target = resolve_device(device)
    try:
        tokenizer = load_tokenizer(folder, config)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {model} does not load: {error}") from error
    ids_NL = load_evaluation_windows(recipe.data, tokenizer, recipe.seed)
    if family_of(config).masked:
        ids_NL = masked_tokens(ids_NL, tokenizer, recipe.seed).ids_NL
    return inspect_model(
        StreamedCheckpoint(folder, config, resolve_dtype(dtype, config), target),
        ids_NL,
        duplicate_cosine=duplicate_cosine,
        name=short_name(model),
        text=text.name if text.is_file() else source,
    )


def short_name(model: str) -> str:
    """The last part of a Hub id, or the name of a folder."""
    return Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]


def check_targets(model: str, png: Path | None, json: Path | None) -> Path:
    """Raise RecipeError unless both may be written as new files, before any work is done.

    Returns:
        The PNG file: `png`, or `inspect-<model name>.png` in the current directory.
    """
    picture = png or Path(f"inspect-{short_name(model)}.png")
    targets = [("--png", picture)] + ([("--json", json)] if json else [])
    for option, path in targets:
        if path.exists():
            raise RecipeError(
                f"{path} exists and is not overwritten; name another file with {option}"
            )
        if not path.absolute().parent.is_dir():
            raise RecipeError(f"the folder of {path} does not exist; make it, or name another file")
    if json and json.resolve() == picture.resolve():
        raise RecipeError(f"--png and --json both name {json}; give each a file of its own")
    return picture


def write_outputs(inspection: Inspection, png: Path, json: Path | None) -> None:
    """Write the picture and, where asked for, the JSON; raises CheckpointError where it fails."""
    try:
        plot_inspection(inspection, png)
        if json:
            json.write_text(inspection.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write {error.filename}: {error.strerror or error}; name another file with "
            "--png or --json"
        ) from error
