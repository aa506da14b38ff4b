"""The Python API: a wrapper around a `PreTrainedModel`, and `compress` for whole recipes.

Both build a recipe and hand it to the pipeline: the command line runs the same code.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.checkpoint.hub import push_folder
from hf_compress.errors import RecipeError
from hf_compress.model.families import family_of
from hf_compress.pipeline import run
from hf_compress.recipe import Recipe, parse_recipe
from hf_compress.report import Metrics, load_metrics
from hf_compress.subject import Subject

Texts = Iterable[Any] | None


class Compressor:
    """Compress a model held in memory. The model given is read and never changed.

    Args:
        model: a causal or masked language model of a known family.
        tokenizer: its tokenizer.
        workspace: folder for intermediate results, kept for a later call; without it a
            temporary one that goes with the object.
        seed: decides which windows of text are used.

    Attributes:
        model: as the stages so far have left it; the dense model before the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        workspace: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._dense = model
        self._temporary = None if workspace else tempfile.TemporaryDirectory(prefix="hf_compress-")
        root = Path(workspace) if workspace else Path(self._temporary.name)  # type: ignore[union-attr]
        self._folder = root / "compressed"
        self._seed = seed
        self._data: dict[str, Any] = {}
        self._texts: Texts = None
        self._held_out: Texts = None
        self._stages: list[dict[str, Any]] = []

    def calibrate(self, texts: Texts = None, **settings: Any) -> Compressor:
        """Choose the calibration text.

        Args:
            texts: strings or conversations; without it `source` (default: the model's own
                text) decides.
            settings: fields of `recipe.TextSource`, such as `num_samples=64`.
        """
        self._texts = None if texts is None else list(texts)
        self._data["calibration"] = _named(texts, settings)
        return self

    def prune(self, **settings: Any) -> Compressor:
        """Prune structure; `self.model` is then the smaller model.

        This and the other stages go on from what the calls before have made: two calls are two
        stages of one recipe.

        Args:
            settings: fields of `recipe.Prune`, such as `sparsity=0.3`.

        Raises:
            CompressionError: see the subclasses; the model is then as before.
        """
        return self._stage("prune", settings)

    def search(self, **settings: Any) -> Compressor:
        """Have the next `prune()`, which then says no sparsity, cut to widths that are searched
        for under budgets.

        Args:
            settings: fields of `recipe.Search`, such as `budget={"parameters": 0.7}`.
        """
        self._stages.append({"stage": "search", **settings})
        return self

    def sparsify(self, **settings: Any) -> Compressor:
        """Make single weights zero.

        Args:
            settings: fields of `recipe.Sparsify`, such as `sparsity=0.5` or `pattern="2:4"`.
        """
        return self._stage("sparsify", settings)

    def refit(self, **settings: Any) -> Compressor:
        """Train every block on its own output error; kept only if KL to the dense model falls.

        Args:
            settings: fields of `recipe.Refit`, such as `epochs=2`.
        """
        return self._stage("refit", settings)

    def quantize(self, **settings: Any) -> Compressor:
        """Store linear layers in few bits; the last stage. `self.model` is then the quantized
        model.

        Args:
            settings: fields of `recipe.Quantize`, such as `format="nf4"`.
        """
        return self._stage("quantize", settings)

    def distill(self, **settings: Any) -> Compressor:
        """Train on the distributions of the dense model, or of another teacher; kept only if KL
        to it falls on held-out windows.

        Args:
            settings: fields of `recipe.Distill`, such as `max_tokens=500_000` or
                `training={"learning_rate": 1e-4}`.
        """
        return self._stage("distill", settings)

    def evaluate_on(self, texts: Texts = None, **settings: Any) -> Compressor:
        """Choose the held-out text; say it before `prune`, which never calibrates on it.

        Args:
            texts: strings or conversations; without it `source` (default `python-docs`)
                decides.
            settings: fields of `recipe.Evaluation`, such as `num_samples=24`.
        """
        self._held_out = None if texts is None else list(texts)
        self._data["evaluation"] = _named(texts, settings)
        return self

    def evaluate(self, *, speed: bool = True) -> Metrics:
        """Measure the compressed model against the dense one on the held-out text.

        Args:
            speed: also time prefill and decode.
        """
        self._run({"speed": speed})
        return load_metrics(self._folder / "metrics.json")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the verified checkpoint with its card, plan, recipe and metrics."""
        self._require_stages()
        target = Path(folder)
        if target.exists() and any(target.iterdir()):
            raise RecipeError(f"the folder {target} is not empty; choose another")
        shutil.copytree(self._folder, target, dirs_exist_ok=True)

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Upload what `save_pretrained` writes; returns the commit's URL."""
        self._require_stages()
        return push_folder(self._folder, repo_id, **settings)

    def _stage(self, kind: str, settings: dict[str, Any]) -> Compressor:
        self._stages.append({"stage": kind, **settings})
        try:
            self._run({"speed": False})
        except BaseException:
            self._stages.pop()
            raise
        self.model = _load(self._folder, self._dense)
        return self

    def _run(self, evaluate: dict[str, Any]) -> None:
        self._require_stages()
        recipe = parse_recipe(
            {
                "model": self._dense.config._name_or_path or self._dense.config.model_type,
                "output": self._folder,
                "seed": self._seed,
                "data": self._data,
                "stages": self._stages,
                "evaluate": evaluate,
            }
        )
        subject = Subject.from_model(self._dense, self.tokenizer, "auto")
        run(recipe, subject, calibration_texts=self._texts, evaluation_texts=self._held_out)

    def _require_stages(self) -> None:
        if not self._stages:
            raise RecipeError("nothing is compressed yet; call prune(sparsity=...) first")


def _named(texts: Texts, settings: dict[str, Any]) -> dict[str, Any]:
    return settings if texts is None else {**settings, "source": "texts"}


def compress(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe | dict[str, Any]
) -> PreTrainedModel:
    """Carry out a recipe on a model in memory; returns the compressed model.

    The recipe's `model` only names the model in the report. The output folder holds the
    checkpoint and its report.
    """
    parsed = recipe if isinstance(recipe, Recipe) else parse_recipe(recipe)
    output = run(parsed, Subject.from_model(model, tokenizer, parsed.device))
    return _load(output, model)


def _load(folder: Path, dense: PreTrainedModel) -> PreTrainedModel:
    """The compressed model, on the device and in the dtype of the dense one."""
    auto_class = family_of(dense.config).auto_class
    return auto_class.from_pretrained(folder, dtype=dense.dtype, device_map=dense.device)
