"""DistillationTrainer: what the loss is over, what is measured, what stays, what resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import EarlyStoppingCallback

from hf_compress.distillation.losses import LOSSES, Objective
from hf_compress.distillation.trainer import PROJECTION, hidden_pairs
from hf_compress.distillation.windows import WindowDataset
from hf_compress.errors import ModelError
from tests.distillation.conftest import curve, student_of
from tests.tiny import VARIANTS, random_ids, tiny_model

CAUSAL = [name for name in VARIANTS if not name.startswith("bert")]


def ragged() -> WindowDataset:
    """Windows in which unlike numbers of tokens count."""
    ids_NL = random_ids(32, 24)
    lengths_N = torch.randint(2, 24, (32,), generator=torch.Generator().manual_seed(5))
    return WindowDataset(ids_NL, torch.arange(24) < lengths_N[:, None])


@pytest.mark.parametrize("name", LOSSES)
def test_the_student_learns_and_the_teacher_does_not(trainer_of: Any, name: str) -> None:
    teacher = tiny_model()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    trainer = trainer_of(teacher=teacher, objective=Objective(name))
    first = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.85 * first
    after = teacher.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("variant", CAUSAL)
def test_every_causal_family_learns(trainer_of: Any, variant: str) -> None:
    teacher, student = tiny_model(variant), tiny_model(variant, seed=1)
    trainer = trainer_of(student, teacher, training={"max_steps": 4, "learning_rate": 3e-3})
    first = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < first


def test_evaluation_is_what_the_models_logits_say(trainer_of: Any) -> None:
    teacher = tiny_model()
    student = student_of(teacher)
    trainer = trainer_of(student, teacher)
    metrics = trainer.evaluate()
    ids_NL = trainer.eval_dataset.ids_NL
    with torch.no_grad():
        log_p, log_q = (
            torch.log_softmax(model(ids_NL).logits[:, :-1], -1) for model in (teacher, student)
        )
    kl_NL = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert metrics["eval_kl"] == pytest.approx(kl_NL.mean().item(), rel=1e-4)
    assert torch.allclose(trainer.window_kl_N, kl_NL.double().mean(-1), rtol=1e-4)
    nll = functional.nll_loss(log_q.flatten(0, 1), ids_NL[:, 1:].flatten())
    assert metrics["eval_perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)


def test_accumulated_batches_are_one_batch_however_many_tokens_count(trainer_of: Any) -> None:
    curves = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = trainer_of(data=ragged(), training=training)
        trainer.train()
        curves.append(curve(trainer))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


def test_checkpointed_activations_give_the_same_curve(trainer_of: Any) -> None:
    plain, checkpointed = trainer_of(), trainer_of(training={"activation_checkpointing": True})
    plain.train()
    checkpointed.train()
    assert curve(checkpointed) == pytest.approx(curve(plain), rel=1e-5)


def test_the_logged_loss_is_the_mean_over_tokens(trainer_of: Any) -> None:
    trainer = trainer_of(training={"learning_rate": 0.0, "max_steps": 8})
    trainer.train()
    expected = trainer.evaluate(trainer.train_dataset)["eval_kl"]
    losses = curve(trainer)  # eight steps are one epoch
    assert sum(losses) / len(losses) == pytest.approx(expected, rel=1e-4)


def test_training_that_was_cut_off_goes_on_with_the_same_curve(
    trainer_of: Any, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    whole = trainer_of(training=saving)
    whole.train()
    folder = tmp_path / "training" / "checkpoint-3"
    again = trainer_of(student_of(tiny_model(), noise=0.5), training=saving)
    again.train(resume_from_checkpoint=str(folder))
    assert curve(again) == pytest.approx(curve(whole), rel=1e-5)
    minutes = [entry["minutes"] for entry in again.state.log_history]
    assert minutes == sorted(minutes)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, again.model.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_zeros_stay_zero_and_the_rest_moves(trainer_of: Any, optimizer: str) -> None:
    student = student_of(tiny_model())
    weight_OI = student.get_parameter("model.layers.0.mlp.up_proj.weight")
    generator = torch.Generator().manual_seed(0)
    zeros_OI = torch.rand(weight_OI.shape, generator=generator) < 0.5
    with torch.no_grad():
        weight_OI[zeros_OI] = 0
    before_OI = weight_OI.detach().clone()
    training = {"optim": optimizer, "weight_decay": 0.1, "learning_rate": 1e-2}
    trainer_of(student, training=training).train()
    assert torch.equal(weight_OI == 0, zeros_OI)
    assert (weight_OI[~zeros_OI] != before_OI[~zeros_OI]).float().mean() > 0.99


def test_zeros_are_free_where_that_is_asked(trainer_of: Any) -> None:
    student = student_of(tiny_model())
    weight_OI = student.get_parameter("model.layers.0.mlp.up_proj.weight")
    with torch.no_grad():
        weight_OI[::2] = 0
    trainer_of(student, keep_zeros=False).train()
    assert (weight_OI[::2] != 0).float().mean() > 0.5


def test_products_in_bfloat16_step_on_float32_weights(trainer_of: Any) -> None:
    teacher = tiny_model().bfloat16()
    trainer = trainer_of(student_of(tiny_model()), teacher, training={"bf16": True})
    first = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.9 * first
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    exact = trainer_of(student_of(tiny_model()), tiny_model())
    exact.train()
    assert curve(trainer) == pytest.approx(curve(exact), rel=0.1)


def test_hidden_states_of_other_widths_are_compared_through_a_projection(
    trainer_of: Any, tmp_path: Path
) -> None:
    teacher = tiny_model(seed=1, hidden_size=60, num_hidden_layers=4)
    training = {"learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 4}
    trainer = trainer_of(tiny_model(), teacher, training=training, hidden_cosine=1.0)
    before = trainer.model.get_submodule(PROJECTION).weight.detach().clone()
    trainer.train()
    losses = curve(trainer)
    assert losses[-1] < losses[0]
    assert not torch.equal(before, trainer.model.get_submodule(PROJECTION).weight)
    again = trainer_of(tiny_model(seed=7), teacher, training=training, hidden_cosine=1.0)
    again.train(resume_from_checkpoint=str(tmp_path / "training" / "checkpoint-4"))
    assert curve(again) == pytest.approx(losses, rel=1e-5)


def test_hidden_states_equal_to_the_teachers_cost_nothing(trainer_of: Any) -> None:
    training = {"learning_rate": 0.0, "max_steps": 1}
    trainer = trainer_of(tiny_model(), training=training, hidden_cosine=3.0)
    trainer.train()
    assert abs(curve(trainer)[0]) < 1e-4


def test_blocks_are_paired_with_those_they_stand_for() -> None:
    def config(num: int) -> Any:
        return tiny_model(num_hidden_layers=num).config

    assert hidden_pairs(config(2), config(4)) == [(1, 2), (2, 4)]
    assert hidden_pairs(config(2), config(3), [0, 1]) == [(1, 1)]
    assert hidden_pairs(config(2), config(3), [0, 2]) == [(1, 1), (2, 3)]


def test_the_best_checkpoint_is_kept_and_training_stops_early(trainer_of: Any) -> None:
    training = {
        "learning_rate": 0.3,  # ruins the student after a warm-up that helps it
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 100,
        "max_steps": 60,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "kl",
        "greater_is_better": False,
    }
    trainer = trainer_of(training=training, callbacks=[EarlyStoppingCallback(3)])
    trainer.train()
    measured = [entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry]
    assert len(measured) < 60
    assert min(measured) < measured[-1]
    assert trainer.evaluate()["eval_kl"] == pytest.approx(min(measured), rel=1e-5)


def test_a_loss_that_is_no_number_is_one_clear_error(trainer_of: Any) -> None:
    training = {"learning_rate": 1e30, "max_grad_norm": 0.0, "logging_nan_inf_filter": False}
    with pytest.raises(ModelError, match=r"diverged.*lower learning_rate, which is 1e\+30"):
        trainer_of(training=training).train()


def test_a_head_that_does_more_is_refused(trainer_of: Any) -> None:
    student = tiny_model()
    head = student.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: 0.1 * out)
    with pytest.raises(ModelError, match="head of this llama does more"):
        trainer_of(student)
