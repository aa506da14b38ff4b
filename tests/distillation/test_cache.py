"""A cached teacher: what is drawn, what is written, what a student learns from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_compress.distillation.cache import CachedDataset, draw, write_cache
from hf_compress.distillation.windows import WindowDataset
from hf_compress.errors import CheckpointError
from tests.distillation.conftest import curve, student_of
from tests.tiny import VOCAB, random_ids, tiny_model


def test_every_draw_is_counted_once_and_none_twice() -> None:
    p_CV = torch.softmax(2 * torch.randn(40, 30, generator=torch.Generator().manual_seed(0)), -1)
    ids_CK, counts_CK = draw(p_CV, 50, torch.Generator().manual_seed(1))
    assert (counts_CK.sum(-1) == 50).all()
    for ids_K, counts_K in zip(ids_CK, counts_CK, strict=True):
        named = ids_K[counts_K > 0]
        assert len(named.unique()) == len(named)


def test_weights_are_the_probabilities_on_average() -> None:
    p_V = torch.softmax(torch.randn(30, generator=torch.Generator().manual_seed(0)), -1)
    ids_CK, counts_CK = draw(p_V.expand(4000, -1), 50, torch.Generator().manual_seed(1))
    mean_V = torch.zeros(30).scatter_add_(0, ids_CK.flatten(), counts_CK.flatten() / 50 / 4000)
    error_V = (p_V * (1 - p_V) / 200_000).sqrt()
    assert ((mean_V - p_V).abs() < 4 * error_V).all()


@pytest.fixture
def cached(tmp_path: Path) -> CachedDataset:
    write_cache(tmp_path / "cache", tiny_model(), WindowDataset(random_ids(32, 24)), draws=50)
    return CachedDataset(tmp_path / "cache")


def test_what_is_written_is_read_again(cached: CachedDataset, tmp_path: Path) -> None:
    windows = WindowDataset(random_ids(32, 24))
    assert len(cached) == 32
    for index in (0, 31):
        assert torch.equal(cached[index]["input_ids"], windows[index]["input_ids"])
        assert torch.equal(cached[index]["labels"], windows[index]["labels"])
        assert torch.allclose(cached[index]["teacher_weights"].sum(-1), torch.ones(24))
        assert cached[index]["teacher_ids"].max() < VOCAB
    files = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {name.rpartition(".")[2] for name in files} == {"arrow", "json"}


def test_the_gradient_of_the_loss_is_that_of_forward_kl_on_average(
    trainer_of: Any, tmp_path: Path
) -> None:
    teacher = tiny_model()
    student = student_of(teacher, noise=0.1)
    windows = WindowDataset(random_ids(1, 24))
    exact = gradient(trainer_of(student, teacher), windows)
    total, errors = torch.zeros_like(exact), {}
    for seed in range(1, 65):
        write_cache(tmp_path / str(seed), teacher, windows, draws=50, seed=seed)
        trainer = trainer_of(student, teacher)
        total += gradient(trainer, CachedDataset(tmp_path / str(seed)))
        errors[seed] = ((total / seed - exact).norm() / exact.norm()).item()
    # An unbiased estimate: its error falls with the square root of the number of draws.
    assert errors[64] < 1.5 * errors[1] / 8


def gradient(trainer: Any, data: Any) -> torch.Tensor:
    inputs = {name: value[None] for name, value in data[0].items()}
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, inputs).backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


def test_a_student_learns_from_a_cached_teacher_as_from_a_live_one(
    trainer_of: Any, cached: CachedDataset
) -> None:
    teacher = tiny_model()
    live = trainer_of(student_of(teacher), teacher)
    live.train()
    trainer = trainer_of(student_of(teacher), teacher, data=cached)
    first = trainer.evaluate()["eval_kl"]
    asked: list[int] = []
    handle = teacher.register_forward_hook(lambda *_: asked.append(1))
    trainer.train()
    handle.remove()
    assert not asked
    assert len(curve(trainer)) == 8
    last = trainer.evaluate()["eval_kl"]
    assert last < first
    assert first - last > 0.5 * (first - live.evaluate()["eval_kl"])


def test_a_folder_without_a_cache_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no cached teacher"):
        CachedDataset(tmp_path)
