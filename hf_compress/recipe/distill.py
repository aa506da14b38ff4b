"""What a recipe says of `stage: distill`, and which arguments of training it may pass on."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hf_compress.recipe.strict import Strict

OURS = {
    "output_dir": "the workspace keeps training",
    "max_steps": "max_tokens says how long it takes",
    "num_train_epochs": "max_tokens says how long it takes",
    "seed": "it is the recipe's",
    "data_seed": "it is the recipe's",
    "use_cpu": "the recipe says device",
    "no_cuda": "the recipe says device",
    "remove_unused_columns": "the trainer reads all columns",
    "label_names": "there is one kind of labels",
    "resume_from_checkpoint": "the same command goes on by itself",
    "load_best_model_at_end": "the best checkpoint by held-out KL is always the one kept",
    "metric_for_best_model": "the best checkpoint by held-out KL is always the one kept",
    "greater_is_better": "the best checkpoint by held-out KL is always the one kept",
    "eval_strategy": "set eval_steps",
    "save_strategy": "a checkpoint is saved at every evaluation; set eval_steps",
    "save_steps": "a checkpoint is saved at every evaluation; set eval_steps",
    "push_to_hub": "use `hf-compress push`",
    "do_train": "the stage trains and evaluates",
    "do_eval": "the stage trains and evaluates",
    "do_predict": "the stage trains and evaluates",
    "label_smoothing_factor": "the loss is a distillation loss",
    "auto_find_batch_size": "max_tokens is divided by the batch size",
}
"""Arguments of training that a recipe does not set, and why."""


class Distill(Strict):
    """Train the compressed model on its teacher's distributions over tokens. What comes out is
    kept only if it lowers KL to the teacher on the fitness windows."""

    stage: Literal["distill"] = "distill"
    loss: Literal["forward_kl", "reverse_kl", "jsd", "top_k"] = "forward_kl"
    """The divergence; see `hf_compress.distillation.losses.LOSSES`."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both; the loss is multiplied by its square."""
    beta: float = Field(0.5, gt=0, lt=1)
    """With `jsd`: the teacher's share of the mixture."""
    top_k: int = Field(64, ge=1)
    """With `top_k`: the tokens that are told apart; all others are one bucket."""
    cross_entropy: float = Field(0.0, ge=0, le=1)
    """Share of the text's own next token in the loss; 1 leaves the teacher out of it."""
    hidden_cosine: float = Field(0.0, ge=0)
    """Weight of 1 - cosine of the hidden states behind each block, through a learned projection
    where the two models differ in width. Helps where layers were dropped."""
    completion_only: bool = False
    """Only the answers of conversations count, in training and on held-out text; needs
    `chat_template: true` of data.calibration."""
    max_tokens: int = Field(500_000, ge=1)
    """Tokens to train on: windows of the calibration source, those for calibration and more of
    its text; read several times where it has fewer."""
    teacher: str | None = None
    """A folder or Hub id with another model of the same tokenizer; the dense model unless said."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4"] = "auto"
    """`auto` keeps the checkpoint's; `int8` and `nf4` load it with bitsandbytes."""
    cached_draws: int = Field(0, ge=0, le=255)
    """Unless 0: pass the training text once through the teacher, keep this many tokens drawn from
    each of its distributions in the workspace (50 will do), and learn from these; a student that
    comes later needs no such pass. With `forward_kl` at temperature 1."""
    method: Literal["full", "lora"] = "full"
    """Train all weights, or low-rank adapters (PEFT) that are merged at the end."""
    lora_rank: int = Field(16, ge=1)
    """With `lora`."""
    save_adapter: bool = False
    """With `lora`: also keep the adapter by itself, as PEFT writes it, in `adapter/`."""
    patience: int = Field(3, ge=1)
    """Evaluations without a lower held-out KL after which training ends."""
    training: dict[str, Any] = Field({})
    """Any `transformers.TrainingArguments`, such as `learning_rate` (1e-4, or 2e-4 with `lora`; at
    30 % pruned, 4e-4 first undoes more than a few thousand tokens teach),
    `per_device_train_batch_size` (4), `eval_steps` (ten evaluations) or `report_to` (none)."""

    @field_validator("training")
    @classmethod
    def _known(cls, training: dict[str, Any]) -> dict[str, Any]:
        if not training:
            return training
        # Imported here: it takes seconds, and most recipes need none of it.
        from transformers import TrainingArguments

        fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
        for name in training:
            if name in OURS or name.startswith("hub_"):
                raise ValueError(f"{name} is not set here: {OURS.get(name, OURS['push_to_hub'])}")
            if name not in fields:
                near = difflib.get_close_matches(name, fields.keys() - OURS.keys(), 3, 0.5)
                said = f"; near are {', '.join(near)}" if near else ""
                raise ValueError(f"{name} is no field of transformers.TrainingArguments{said}")
        return {name: _number(fields[name].default, value) for name, value in training.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Distill:
        if self.save_adapter and self.method != "lora":
            raise ValueError("save_adapter needs method: lora; method full makes no adapter")
        plain = self.loss == "forward_kl" and self.temperature == 1 and not self.hidden_cosine
        if self.cached_draws and not (plain and self.cross_entropy < 1):
            raise ValueError(
                "cached_draws knows the teacher by tokens drawn at temperature 1, which only "
                "loss: forward_kl with hidden_cosine: 0 and cross_entropy below 1 can use; set it "
                "to 0 for another loss"
            )
        return self


def _number(default: Any, value: Any) -> Any:
    """YAML reads 4e-4 as text: the number it means, where a number is asked for."""
    if not isinstance(value, str) or isinstance(default, bool | str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
