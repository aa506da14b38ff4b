"""A whole recipe: read, checked, overridden and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from hf_compress.errors import RecipeError
from hf_compress.recipe.distill import Distill
from hf_compress.recipe.quantize import Quantize
from hf_compress.recipe.search import Search
from hf_compress.recipe.stages import SUBLAYERS, Calibrate, Prune, Refit, Sparsify
from hf_compress.recipe.strict import Strict
from hf_compress.recipe.text import Data

Stage = Annotated[
    Calibrate | Distill | Prune | Quantize | Refit | Search | Sparsify,
    Field(discriminator="stage"),
]


class Evaluate(Strict):
    """What the report measures besides perplexity and KL to the dense model."""

    speed: bool = True
    """Prefill and decode tokens per second, dense and compressed in one run."""
    prefill_tokens: int = Field(512, ge=8)
    decode_tokens: int = Field(32, ge=4)


SEARCHED_ON = 48
"""Fitness windows of a search over layers, unless the recipe says how many."""


class Recipe(Strict):
    """A whole run."""

    model: str
    """A Hub id, or a folder with a checkpoint."""
    output: Path
    """Folder of the compressed checkpoint; the workspace is written beside it."""
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the weights while compressing and in the output; `auto` keeps the model's."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    data: Data = Data()
    stages: list[Stage] = Field(min_length=1)
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="before")
    @classmethod
    def _enough_to_search_on(cls, raw: Any) -> Any:
        """A search over layers compares many more models than a choice of a split does."""
        data = raw.get("data", {})
        for stage in raw.get("stages") or []:
            said = stage if isinstance(stage, dict) else {}
            searches = said.get("stage") == "search" and said.get("uniform") is False
            if searches and isinstance(data, dict) and "num_fitness_samples" not in data:
                return {**raw, "data": {**data, "num_fitness_samples": SEARCHED_ON}}
        return raw

    @model_validator(mode="after")
    def _sublayers_go_last(self) -> Recipe:
        changing = [stage for stage in self.stages if isinstance(stage, Prune | Search)]
        for at, stage in enumerate(changing):
            if isinstance(stage, Search):
                differ, later = not stage.uniform, changing[at + 2 :]
            else:
                differ, later = bool(SUBLAYERS.keys() & set(stage.structures)), changing[at + 1 :]
            if differ and later:
                raise ValueError(
                    "a model whose layers differ is not pruned again: only the last prune stage "
                    "may have attention_sublayers or mlp_sublayers among its structures, or a "
                    "search with uniform: false before it"
                )
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key.path=value` overrides to it.

    Args:
        path: the YAML file.
        overrides: such as `stages.0.sparsity=0.3`; the value is parsed as YAML.

    Raises:
        RecipeError: unreadable file, unknown key or value out of range, with its path.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path} holds a {type(raw).__name__}, not a mapping; "
            "a recipe starts with `model:`, `output:` and `stages:`"
        )
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw)


def parse_recipe(raw: dict[str, Any]) -> Recipe:
    """Validate a recipe given as a dict; raises RecipeError that names every fault."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _override(raw: Any, override: str) -> None:
    path, sep, value = override.partition("=")
    if not sep or not path:
        raise RecipeError(f"--set {override!r} is not of the form key.path=value")
    *parents, last = path.split(".")
    node = raw
    for depth, part in enumerate(parents):
        if isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            node = node[_index(node, part, ".".join(parents[: depth + 1]), override)]
    parsed = yaml.safe_load(value)
    if isinstance(node, dict):
        node[last] = parsed
    else:
        node[_index(node, last, path, override)] = parsed


def _index(node: Any, part: str, path: str, override: str) -> int:
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return int(part)
    size = f"a list of {len(node)}" if isinstance(node, list) else f"the value {node!r}"
    raise RecipeError(f"--set {override!r}: {path!r} does not exist; its parent is {size}")


def _explain(error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        lines.append(f"  {where}: {_reason(fault)}")
    return "the recipe is not valid:\n" + "\n".join(lines)


def _reason(fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        return f"unknown key; the valid ones here are {', '.join(_fields_at(fault['loc'][:-1]))}"
    if fault["type"] == "missing":
        return "is required"
    return f"{fault['msg']} (got {fault['input']!r})"


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """Names of the keys that a recipe takes at `loc`, by walking the classes."""
    if len(loc) >= 3 and loc[0] == "stages":
        union, _ = get_args(Stage)
        stages: dict[str, type[BaseModel]] = {
            kind.model_fields["stage"].default: kind for kind in get_args(union)
        }
        return list(stages[str(loc[2])].model_fields)
    model: type[BaseModel] = Recipe
    for part in loc:
        inner: Any = model.model_fields[str(part)].annotation
        model = inner
    return list(model.model_fields)
