"""The fused losses: what they equal, and what they never put into memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_compress.distillation.losses import (
    LOSSES,
    Head,
    Objective,
    fused_loss,
    mixed,
    sampled_loss,
    teacher_loss,
    text_loss,
)
from tests.tiny import random_ids, tiny_model

TOKENS, VOCAB, WIDTH, OTHER = 37, 50, 12, 20


def case(
    bias: bool = False, softcap: float | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden": normal(TOKENS, WIDTH).requires_grad_(),
        "weight": normal(VOCAB, WIDTH).requires_grad_(),
        "bias": normal(VOCAB).requires_grad_() if bias else None,
        "softcap": softcap,
        "teacher": normal(TOKENS, OTHER),
        "teacher_head": Head(normal(VOCAB, OTHER) / 2, None, softcap),
        "targets": torch.randint(VOCAB, (TOKENS,), generator=generator),
    }


def naive(given: dict[str, Any], objective: Objective) -> torch.Tensor:
    """The textbook's loss on logits of all tokens, summed."""

    def logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        raw = functional.linear(hidden, weight, bias)
        cap = given["softcap"]
        return raw if cap is None else cap * torch.tanh(raw / cap)

    student = logits(given["hidden"], given["weight"], given["bias"])
    teacher = logits(given["teacher"], given["teacher_head"].weight_VD, None)
    tau = objective.temperature
    p, q = torch.softmax(teacher / tau, -1), torch.softmax(student / tau, -1)
    if objective.loss == "forward_kl":
        divergence = (p * (p.log() - q.log())).sum(-1)
    elif objective.loss == "reverse_kl":
        divergence = (q * (q.log() - p.log())).sum(-1)
    elif objective.loss == "jsd":
        m = objective.beta * p + (1 - objective.beta) * q
        first, second = (p * (p / m).log()).sum(-1), (q * (q / m).log()).sum(-1)
        divergence = objective.beta * first + (1 - objective.beta) * second
    else:
        top = p.topk(objective.top_k).indices
        a, b = p.gather(-1, top), q.gather(-1, top)
        rest_a, rest_b = 1 - a.sum(-1), 1 - b.sum(-1)
        divergence = (a * (a / b).log()).sum(-1) + rest_a * (rest_a / rest_b).log()
    text = functional.cross_entropy(student, given["targets"], reduction="none")
    share = objective.cross_entropy
    return ((1 - share) * tau**2 * divergence + share * text).sum()


def fused(given: dict[str, Any], objective: Objective, chunk: int = 8) -> torch.Tensor:
    divergence = teacher_loss(given["teacher"], given["teacher_head"], objective)
    loss = mixed(divergence, text_loss(given["targets"]), objective.cross_entropy)
    head = Head(given["weight"], given["bias"], given["softcap"])
    return fused_loss(given["hidden"], head, loss, chunk)


def gradients(given: dict[str, Any], loss: torch.Tensor) -> list[torch.Tensor]:
    leaves = [given[name] for name in ("hidden", "weight", "bias") if given[name] is not None]
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("cross_entropy", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 3.0)])
def test_every_loss_equals_the_naive_one_and_so_do_its_gradients(
    name: str, temperature: float, cross_entropy: float, bias: bool, softcap: float | None
) -> None:
    given = case(bias, softcap)
    objective = Objective(name, temperature, 0.3, 7, cross_entropy)
    ours, theirs = fused(given, objective), naive(given, objective)
    assert torch.allclose(ours, theirs, rtol=1e-4)
    for mine, other in zip(
        gradients(given, 2.5 * ours), gradients(given, 2.5 * theirs), strict=True
    ):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str) -> None:
    given = case()
    given |= {
        "teacher": given["hidden"].detach(),
        "teacher_head": Head(given["weight"].detach()),
    }
    loss = fused(given, Objective(name))
    assert loss.abs() < 1e-4
    assert all(grad.abs().max() < 1e-4 for grad in gradients(given, loss))


def test_a_certain_teacher_gives_finite_gradients() -> None:
    given = case()
    given["teacher_head"] = Head(200 * given["teacher_head"].weight_VD)
    for name in LOSSES:
        loss = fused(given, Objective(name, top_k=5))
        assert loss.isfinite(), name
        assert all(grad.isfinite().all() for grad in gradients(given, loss)), name


def test_nothing_is_kept_for_gradients_that_nobody_wants() -> None:
    given = case()
    given["weight"].requires_grad_(False)
    loss = fused(given, Objective())
    (grad,) = torch.autograd.grad(loss, [given["hidden"]])
    assert grad.shape == given["hidden"].shape
    with torch.no_grad():
        silent = fused(given, Objective())
    assert not silent.requires_grad
    assert silent == loss.detach()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_of_all_tokens_by_the_vocabulary_is_ever_made(name: str) -> None:
    objective = Objective(name, top_k=7, cross_entropy=0.5)
    given = case()
    with Largest() as seen:
        gradients(given, fused(given, objective, chunk=4))
    assert seen.elements <= max(4 * VOCAB, VOCAB * OTHER) < TOKENS * VOCAB
    with Largest() as seen:
        gradients(given, naive(given, objective))
    assert seen.elements == TOKENS * VOCAB


@pytest.mark.parametrize("variant", ["gemma2", "llama-tied-biased", "gpt_neox", "opt-350m", "gpt2"])
def test_a_head_gives_the_models_own_logits(variant: str) -> None:
    model = tiny_model(variant, **({"final_logit_softcapping": 2.0} if variant == "gemma2" else {}))
    captured: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: captured.append(args[0])
    )
    with torch.no_grad():
        logits = model(random_ids(2, 8)).logits
    handle.remove()
    assert torch.allclose(Head.of(model).logits(captured[0]), logits, atol=1e-5)


def test_autocast_products_leave_a_float32_gradient_near_the_exact_one() -> None:
    given = case()
    exact = gradients(given, fused(given, Objective()))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(given, fused(given, Objective()))
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        assert 0 < (a - b).norm() < 0.03 * a.norm()


def test_the_gradient_of_a_sampled_teacher_is_that_of_forward_kl_on_average() -> None:
    given = case()
    head = Head(given["weight"])
    exact = gradients(given, fused(given, Objective()))[1]
    p_TV = torch.softmax(given["teacher_head"].logits(given["teacher"]), -1)
    generator = torch.Generator().manual_seed(1)
    total, errors = torch.zeros_like(exact), {}
    for draw in range(1, 257):
        ids_TK = torch.multinomial(p_TV, 50, replacement=True, generator=generator)
        weights_TK = torch.full(ids_TK.shape, 1 / 50)
        loss = fused_loss(given["hidden"], head, sampled_loss(ids_TK, weights_TK))
        total += gradients(given, loss)[1]
        errors[draw] = ((total / draw - exact).norm() / exact.norm()).item()
    # An unbiased estimate: its error falls with the square root of the number of draws.
    assert errors[256] < 1.5 * errors[1] / 16
