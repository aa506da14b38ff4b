"""transformers' Trainer with a teacher: the loss, what is measured beside it, what stays zero.

Legend: B windows in a batch, L tokens in a window, T tokens whose prediction counts, D hidden
size, N windows of an evaluation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_compress.distillation.losses import (
    Head,
    Objective,
    TokenLoss,
    cosine_loss,
    fused_loss,
    mixed,
    sampled_loss,
    teacher_loss,
    text_loss,
)
from hf_compress.errors import ModelError, RecipeError
from hf_compress.model.divergence import UNASKED

PROJECTION = "distillation_projection"
"""Submodule of the student while it is trained, where hidden states are compared."""


class Course(TrainerCallback):
    """Minutes that training has taken, earlier runs of it included; where evaluation is asked for
    at all, the last step is evaluated too."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        spent = [entry["minutes"] for entry in state.log_history if "minutes" in entry]
        self._start = time.perf_counter() - 60 * max(spent, default=0.0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    @property
    def minutes(self) -> float:
        return (time.perf_counter() - self._start) / 60


class DistillationTrainer(Trainer):
    """A `Trainer` whose loss compares a student with its teacher.

    Batches hold `input_ids` and `labels` [B, L], the labels `-100` where the prediction of a
    token does not count, and perhaps `attention_mask`; with `teacher_ids` and `teacher_weights`
    [B, L, K] (see `cache`) the teacher itself is not asked while training.

    Evaluation reports `kl`, KL(teacher || student) at temperature 1, and `perplexity`.

    Args:
        model: the student, a causal language model or one with PEFT adapters. Its weights are
            what the optimizer steps on: give float32 ones, and `bf16=True` for the products.
        teacher: of the same tokenizer; it is frozen, and stays in its dtype.
        args: with `per_device_train_batch_size` and so on, as for any `Trainer`.
        objective: what is minimized.
        hidden_cosine: weight of the mean, over mapped blocks, of 1 - cosine of hidden states.
        layers: for each block of the student, that of the teacher which it is compared with;
            spread evenly unless they are given.
        keep_zeros: weights of matrices that are zero stay zero.
        others: passed on to `Trainer`.

    Attributes:
        window_kl_N: KL of each window of the last evaluation, float64.

    Raises:
        RecipeError: the student cannot be trained so.
        ModelError: the loss is not finite; a head is not one that is understood.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        args: TrainingArguments,
        *,
        objective: Objective | None = None,
        hidden_cosine: float = 0.0,
        layers: Sequence[int] | None = None,
        keep_zeros: bool = True,
        **others: Any,
    ) -> None:
        self.objective = objective or Objective()
        self.window_kl_N = torch.empty(0, dtype=torch.float64)
        self._hidden_cosine = hidden_cosine
        self._course = Course()
        self._zeros = _zeros(model) if keep_zeros else {}
        self._pairs: list[tuple[int, int]] = []
        if hidden_cosine:
            self._pairs = hidden_pairs(_plain(model).config, teacher.config, layers)
            _attach_projection(model, teacher)
        if args.ddp_find_unused_parameters is None:
            # The loss runs the head outside of forward, where it would be taken for unused.
            args.ddp_find_unused_parameters = False
        super().__init__(model=model, args=args, **others)
        if self.args.n_gpu > 1:
            raise RecipeError(
                f"{self.args.n_gpu} GPUs in one process; use `accelerate launch`, one process for "
                "each, or show it a single one with CUDA_VISIBLE_DEVICES"
            )
        self.model_accepts_loss_kwargs = True  # the loss below is the sum over num_items_in_batch
        self.teacher = teacher.eval().requires_grad_(False)
        for each in (_plain(model), self.teacher):
            if not getattr(each, "is_quantized", False):  # which stays where it was loaded
                each.to(self.args.device)
            check_head(each)
        self.add_callback(self._course)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The sum over this batch's tokens, over the tokens of all batches of the step."""
        asked_BL = inputs["labels"][:, 1:] != UNASKED
        with head_input(_plain(self.model)) as read:
            outputs = model(**_read_by_a_model(inputs), **self._with_hidden_states)
        student_TD = read[0][:, :-1][asked_BL]
        told = "teacher_ids" in inputs and not self._pairs
        teacher_TE, teacher_outputs = (None, None) if told else self._ask(inputs, asked_BL)
        token_loss = self._token_loss(inputs, asked_BL, teacher_TE)
        with self.accelerator.autocast():
            head = Head.of(_plain(self.model))
            loss = fused_loss(student_TD, head, token_loss)
            if self._pairs:
                loss = loss + self._hidden_cosine * self._cosine(outputs, teacher_outputs, asked_BL)
        counted = asked_BL.sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / counted
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Counted over all processes, whose gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """KL to the teacher and perplexity, over all tokens of the windows together."""
        student, start = self.model, time.perf_counter()
        was_training = student.training
        student.eval()
        parts = []
        for batch in self.get_eval_dataloader(eval_dataset):
            measured_B3 = self._measure(student, self._prepare_inputs(batch))
            parts.append(self.accelerator.gather_for_metrics(measured_B3).cpu())
        student.train(was_training)
        kl_N, nll_N, tokens_N = torch.cat(parts).T
        self.window_kl_N = kl_N / tokens_N.clamp(min=1)
        metrics = {
            "kl": (kl_N.sum() / tokens_N.sum()).item(),
            "perplexity": (nll_N.sum() / tokens_N.sum()).exp().item(),
            "runtime": time.perf_counter() - start,
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        control: TrainerControl = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also tells the minutes, and stops where a loss is no number."""
        for name in ("loss", "eval_kl"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ModelError(
                    f"training diverged: {name} is {logs[name]} after step "
                    f"{self.state.global_step}; lower learning_rate, which is "
                    f"{self.args.learning_rate:g}, or raise warmup_steps"
                )
        super().log({**logs, "minutes": self._course.minutes}, start_time)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """After each of its steps, the student's zeros are zeros again."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self._zeros:
            optimizer.register_step_post_hook(lambda *_: self._restore_zeros())
        return optimizer

    @torch.no_grad()
    def _restore_zeros(self) -> None:
        for name, zeros_OI in self._zeros.items():
            weight_OI = self.model.get_parameter(name)
            self._zeros[name] = zeros_OI = zeros_OI.to(weight_OI.device)
            weight_OI.masked_fill_(zeros_OI, 0)

    @property
    def _with_hidden_states(self) -> dict[str, bool]:
        return {"output_hidden_states": True} if self._pairs else {}

    @torch.no_grad()
    def _ask(self, inputs: dict[str, Any], asked_BL: torch.Tensor) -> tuple[Any, Any]:
        """What the teacher's head reads [T, E], and what the teacher gives."""
        if self.objective.cross_entropy == 1 and not self._pairs:
            return None, None
        with head_input(self.teacher) as read:
            outputs = self.teacher(**_read_by_a_model(inputs), **self._with_hidden_states)
        return read[0][:, :-1][asked_BL], outputs

    def _token_loss(
        self, inputs: dict[str, Any], asked_BL: torch.Tensor, teacher_TE: torch.Tensor | None
    ) -> TokenLoss:
        text = text_loss(inputs["labels"][:, 1:][asked_BL])
        if "teacher_ids" in inputs:
            ids_TK = inputs["teacher_ids"][:, :-1][asked_BL]
            divergence = sampled_loss(ids_TK, inputs["teacher_weights"][:, :-1][asked_BL])
        elif teacher_TE is not None:
            divergence = teacher_loss(teacher_TE, Head.of(self.teacher), self.objective)
        else:
            return text
        return mixed(divergence, text, self.objective.cross_entropy)

    def _cosine(self, student: Any, teacher: Any, asked_BL: torch.Tensor) -> torch.Tensor:
        """Sum over tokens of the mean over blocks."""
        plain = _plain(self.model)
        projection = plain.get_submodule(PROJECTION) if PROJECTION in plain._modules else None
        losses = [
            cosine_loss(
                student.hidden_states[index][:, :-1][asked_BL],
                teacher.hidden_states[other][:, :-1][asked_BL],
                projection,
            )
            for index, other in self._pairs
        ]
        return torch.stack(losses).mean()

    def _measure(self, student: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """For each window the sums of KL and NLL, and the tokens they are over, [B, 3] float64."""
        rows = []
        for index in range(len(inputs["labels"])):
            window = {name: value[index : index + 1] for name, value in inputs.items()}
            asked_1L = window["labels"][:, 1:] != UNASKED
            with self.accelerator.autocast(), head_input(_plain(student)) as read:
                student(**_read_by_a_model(window))
            with head_input(self.teacher) as taught:
                self.teacher(**_read_by_a_model(window))
            student_TD, teacher_TE = (each[0][:, :-1][asked_1L] for each in (read, taught))
            head = Head.of(_plain(student))
            kl = teacher_loss(teacher_TE, Head.of(self.teacher), Objective())
            text = text_loss(window["labels"][:, 1:][asked_1L])
            with self.accelerator.autocast():
                sums = [fused_loss(student_TD, head, loss) for loss in (kl, text)]
            rows.append(torch.stack([*sums, asked_1L.sum()]).double())
        return torch.stack(rows)


@contextmanager
def head_input(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """While inside, the list holds what the head was last given, [B, L, D], in the graph; the
    head itself gets the last token only, and so makes next to no logits."""
    read: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        read[:] = [args[0]]
        return (args[0][:, -1:], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield read
    finally:
        handle.remove()


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise ModelError unless `Head` computes what the model makes of its last hidden state."""
    ids_1L = torch.arange(4, device=model.device)[None]
    was_training = model.training
    with head_input(model.eval()) as read:
        logits_V = model(input_ids=ids_1L, use_cache=False).logits[0, -1].float()
    model.train(was_training)
    ours_V = Head.of(model).logits(read[0][0, -1:])[0]
    error = (ours_V - logits_V).abs().max() / logits_V.abs().max()
    if not error <= 2e-2:  # what bfloat16 may cost
        raise ModelError(
            f"the head of this {model.config.model_type} does more to its hidden states than a "
            f"linear layer and a soft cap (its logits differ by {error:.2g} of the largest), and "
            "distillation runs the head by itself; use a model without, or teach Head of it "
            "(hf_compress/distillation/losses.py)"
        )


def hidden_pairs(
    student: Any, teacher: Any, layers: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Which of `hidden_states` of the two are compared: behind blocks that are mapped.

    The last entry of `hidden_states` is behind the final norm, so it is compared with nothing
    but a last one.
    """
    num, others = student.num_hidden_layers, teacher.num_hidden_layers
    if layers is None:
        layers = [round((index + 1) * others / num) - 1 for index in range(num)]
    pairs = [(index + 1, other + 1) for index, other in enumerate(layers)]
    return [pair for pair in pairs if (pair[0] == num) == (pair[1] == others)]


def _attach_projection(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """A learned map between hidden sizes, in the student so that checkpoints hold it."""
    plain = _plain(model)
    width, other = plain.config.hidden_size, teacher.config.hidden_size
    if width == other:
        return
    if plain is not model:
        raise RecipeError(
            f"hidden states of {width} and {other} channels are compared through a learned "
            "projection, which an adapter's checkpoint does not hold; use method: full, or "
            "hidden_cosine: 0"
        )
    plain.add_module(PROJECTION, nn.Linear(width, other, bias=False, device=plain.device))


def _read_by_a_model(inputs: dict[str, Any]) -> dict[str, Any]:
    names = ("input_ids", "attention_mask")
    return {"use_cache": False} | {name: inputs[name] for name in names if name in inputs}


def _plain(model: Any) -> PreTrainedModel:
    """The model of transformers inside adapters."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def _zeros(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Where trainable matrices are exactly zero, for those that are somewhere; adapters, which
    start from zeros, are to leave them."""
    if _plain(model) is not model:
        return {}
    return {
        name: parameter.detach() == 0
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dim() > 1 and not parameter.detach().all()
    }
