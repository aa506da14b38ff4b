"""`hf-compress evaluate`: measure the output folder of a run anew, and change nothing in it.

What only the run itself could see (the error of every layer, the candidates, the verification,
the time) is taken from the metrics.json in the folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_compress.data.sources import source_kind
from hf_compress.data.windows import load_evaluation_windows
from hf_compress.errors import CheckpointError, DataError, ModelError, RecipeError
from hf_compress.measurement import compare_checkpoint
from hf_compress.model.loading import load_config, load_tokenizer
from hf_compress.recipe import Recipe, load_recipe
from hf_compress.report import Metrics, load_metrics, parse_metrics, save_metrics
from hf_compress.subject import Subject

FILES = ("config.json", "recipe.yaml", "metrics.json")
"""What the output folder of a run holds, beside the weights."""


def evaluate_folder(folder: str | Path, overrides: Sequence[str] = ()) -> Metrics:
    """Measure a finished run on the evaluation text of its recipe, or on another one.

    Args:
        folder: output folder of a run; it is only read.
        overrides: of the recipe in it, such as `data.evaluation.num_samples=24`. Another
            evaluation text, or another cut of it, leaves out what the run calibrated on.

    Returns:
        The metrics of the run, with everything that can be measured at any time measured now.

    Raises:
        CheckpointError: the folder is not the output of a run.
        CompressionError: see the other subclasses: a recipe, model or text that does not serve.
    """
    folder = Path(folder)
    _require_output(folder)
    stored = load_metrics(folder / "metrics.json")
    made_with = load_recipe(folder / "recipe.yaml")
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    subject = _dense(recipe, folder)
    ids_NL = _windows(made_with, recipe, subject)
    measured = compare_checkpoint(recipe, subject, folder, ids_NL)
    # Of a file that is no longer where it was, the recipe holds a path and no name to show.
    measured["comparison"]["calibration_source"] = stored.comparison.calibration_source
    return parse_metrics({**stored.model_dump(), **measured})


def as_overrides(source: str | None, **values: object) -> list[str]:
    """Options as overrides of a recipe.

    Args:
        source: another evaluation text; the rest of its description (column, split, ...) is
            then as for a new recipe.
        values: by key, with `__` for a dot; what is None is left as the recipe has it.
    """
    overrides = []
    if source is not None:
        values["data__evaluation__source"] = source
        plain = {"name": None, "split": "train", "column": "text", "chat_template": False}
        overrides = [f"data.evaluation.{key}={json.dumps(value)}" for key, value in plain.items()]
    overrides += [
        f"{key.replace('__', '.')}={json.dumps(value, ensure_ascii=False)}"
        for key, value in values.items()
        if value is not None
    ]
    return overrides


def check_target(path: Path, folder: Path) -> None:
    """Raise RecipeError unless metrics of `folder` may be written to `path`, as a new file."""
    if path.exists():
        raise RecipeError(f"{path} exists and is not overwritten; name another file with --json")
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"the folder of {path} does not exist; make it, or name another file")
    if folder.resolve() in path.resolve().parents:
        raise RecipeError(
            f"{path} lies in {folder}, which an evaluation never changes; name a file elsewhere"
        )


def write_metrics(metrics: Metrics, path: Path) -> None:
    """Write metrics as JSON; raises CheckpointError where the place is not writable."""
    try:
        save_metrics(metrics, path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; name another file with --json"
        ) from error


def _require_output(folder: Path) -> None:
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        what = f"holds no {', no '.join(absent)}" if folder.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{folder} {what}; give the output folder of a finished run, the `output` of its "
            f"recipe, which holds {', '.join(FILES)} and the weights"
        )


def _dense(recipe: Recipe, folder: Path) -> Subject:
    """The model to compare with; its logits must be over the tokens of the compressed one."""
    try:
        subject = Subject.from_recipe(recipe)
    except ModelError as error:
        raise ModelError(
            f"cannot load the dense model to compare with: {error}; --model names another place "
            "where it is"
        ) from error
    config = load_config(folder)
    try:
        tokenizer = load_tokenizer(folder, config)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {folder} does not load: {error}") from error
    if (
        config.vocab_size != subject.source.config.vocab_size
        or tokenizer.get_vocab() != subject.tokenizer.get_vocab()
    ):
        raise ModelError(
            f"{subject.name} has other tokens than the compressed model in {folder}, so the two "
            "cannot be compared token by token; --model has to name the model that was compressed"
        )
    return subject


def _windows(made_with: Recipe, recipe: Recipe, subject: Subject) -> torch.Tensor:
    data, tokenizer, seed = made_with.data, subject.tokenizer, made_with.seed
    if recipe.data.evaluation == data.evaluation:
        try:
            return load_evaluation_windows(data, tokenizer, seed)
        except DataError as error:
            raise DataError(f"{error}; --source takes another evaluation text") from error
    try:
        source_kind(data.calibration)
    except DataError as error:
        raise DataError(
            f"another evaluation text has to leave out what the run calibrated on: {error}; or "
            "evaluate on the text of the recipe, without --source"
        ) from error
    return load_evaluation_windows(data, tokenizer, seed, recipe.data.evaluation)
