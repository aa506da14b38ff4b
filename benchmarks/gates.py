"""Learned gates: which units of a layer go is trained with KL to the dense model.

One gate a unit, closed or open; the open ones of a layer are the `keep` with the highest
scores. Only the scores are trained (AdamW, straight through the choice); in every step the
layer's weights are folded for the gates as they stand, so that what a gate is worth is what
its unit adds once the rest has adapted, and not what it adds to a layer that lost a third of
its units and was left so.

With H = G + lam mean(diag G) I and T' = T + lam mean(diag G) W, the folded weight of the kept
columns S is E_S = T'_S P, P = H_SS^-1 (fold.py). Closing kept B takes E_B (P_BB)^-1 P_B: from
it; opening gone B adds U_B [I, -H_BS P], U_B = (T'_B - E_S H_SB) (H_BB - H_BS P H_SB)^-1. The
gradient of a gate is the gradient of the loss along that direction.

Legend: O outputs, I inputs, U units (I = U * unit_width), S kept columns, R gone ones, B those
of one unit, V vocabulary, L tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_compress.calibration import collect_beside
from hf_compress.errors import ModelError
from hf_compress.model.blocks import ModelInMemory, passages, without_blocks
from hf_compress.model.divergence import TOKENS_AT_A_TIME
from hf_compress.model.families import family_of
from hf_compress.model.surgery import expand
from hf_compress.model.walk import Walk
from hf_compress.plan import Plan
from hf_compress.pruning import Streams, Templates, prune_blocks
from hf_compress.pruning.layer import PROBE_DAMPING, OutputLayer
from hf_compress.recipe import Calibrate, Prune
from hf_compress.regression.fold import Regression

PROBLEM_WINDOWS = 48
"""Calibration windows from which the layers that are folded in training are known."""


@dataclass(frozen=True)
class Gates:
    """How gates are trained."""

    steps: int = 30
    windows_per_step: int = 4
    learning_rate: float = 0.015
    """In shares of a layer's units: a step moves a unit by at most so many ranks."""
    fold: bool = True
    """Whether each step folds; otherwise closed units are just missing."""


def prune_by_gates(
    model: PreTrainedModel,
    ids_NL: torch.Tensor,
    plan: Plan,
    settings: Prune,
    gates: Gates,
    seed: int = 0,
) -> ModelInMemory:
    """The model pruned to a plan in the order that gates have learned.

    The first units are those of `settings.criterion`, on a part of the calibration text; then
    the gates are trained; then the usual cut and fold on the pruned stream, by their order.

    Args:
        model: the dense model, whole in memory; it stays as it is, but without gradients.
        ids_NL: calibration windows.
        plan: uniform or not; layers of experts and dropped layers have no gates.
    """
    layers: dict[str, GatedLayer] = {}
    path = family_of(model.config).layers

    def gated(index: int, output: str, layer: OutputLayer) -> OutputLayer:
        widths = plan.layers[plan.positions[index]]
        is_mlp = output == family_of(model.config).mlp_output
        keep = widths.intermediate_size if is_mlp else widths.num_key_value_heads
        if keep < len(layer.order_U):
            layers[f"{path}.{index}.{output}"] = GatedLayer(
                layer.total, layer.order_U, layer.unit_width, keep, gates.fold
            )
        return layer

    def learned(index: int, output: str, layer: OutputLayer) -> OutputLayer:
        own = layers.get(f"{path}.{index}.{output}")
        return replace(layer, order_U=own.order_U) if own else layer

    _cut(model, ids_NL[:PROBLEM_WINDOWS], plan, settings, gated)
    learn(model, layers, ids_NL, gates, seed)
    return _cut(model, ids_NL, plan, settings, learned)


def _cut(
    model: PreTrainedModel,
    ids_NL: torch.Tensor,
    plan: Plan,
    settings: Prune,
    reorder: Callable[[int, str, OutputLayer], OutputLayer],
) -> ModelInMemory:
    """The model pruned as the stage does it."""
    source, calibration = ModelInMemory(model), Calibrate()
    templates = Templates(source, plan)
    pruned, dense = (Walk(source, ids_NL, calibration.batch_size) for _ in range(2))
    weighting = calibration.token_weighting
    beside = partial(collect_beside, pruned, dense, weighting=weighting)
    prefix = f"{source.family.layers}."
    state = {name: value for name, value in model.state_dict().items() if prefix not in name}
    prune_blocks(
        source,
        None,
        plan,
        templates,
        settings,
        streams=Streams(pruned, dense, beside, _no_experts, _no_experts),
        probe=Walk(source, ids_NL[:1]),
        write=state.__setitem__,
        reorder=reorder,
    )
    templates.model.load_state_dict(state, assign=True)
    templates.model.tie_weights()
    return ModelInMemory(templates.model)


def _no_experts(half: nn.Module, index: int) -> NoReturn:
    raise ModelError(f"block {index} has experts, and these gates are of neurons and KV groups")


class GatedLayer:
    """One output layer, with a score for every unit.

    Args:
        problem: what the layer is fitted from, as the pruned model met it.
        order_U: the criterion's order of removal.
        keep: units that stay open.
    """

    def __init__(
        self, problem: Regression, order_U: torch.Tensor, unit_width: int, keep: int, fold: bool
    ) -> None:
        ridge = PROBE_DAMPING * problem.gram_II.diagonal().mean()
        self.weight_OI = problem.weight_OI.float()
        self.gram_II = problem.gram_II.float()
        self.gram_II.diagonal().add_(ridge)
        self.target_OI = (problem.target_OI + ridge * problem.weight_OI).float()
        self.unit_width, self.keep, self.fold = unit_width, keep, fold
        self.kept = order_U[len(order_U) - keep :].sort().values
        self._solve()
        self.scores_U = nn.Parameter(self._first_scores(len(order_U)))

    @property
    def order_U(self) -> torch.Tensor:
        """Units in order of removal, by their scores."""
        return self.scores_U.detach().argsort(stable=True)

    def choose(self) -> int:
        """Open the gates with the highest scores; how many are new."""
        kept = self.order_U[len(self.scores_U) - self.keep :].sort().values
        new = int((~torch.isin(kept, self.kept)).sum())
        if new:
            self.kept = kept
            self._solve()
        return new

    def gradient(self, gradient_OI: torch.Tensor) -> torch.Tensor:
        """Of the scores [U], from that of the loss by `effective_OI`."""
        if not self.fold:
            return _by_unit(gradient_OI * self.weight_OI, self.unit_width).sum((0, 2))
        kept, gone = self._columns()
        out_U = torch.empty(len(self.scores_U))
        inner_OS = gradient_OI[:, kept] @ self._inverse_SS
        out_U[self.kept] = (
            (self._kept_OS * inner_OS).view(len(inner_OS), -1, self.unit_width).sum((0, 2))
        )
        along_OR = gradient_OI[:, gone] - gradient_OI[:, kept] @ self._absorb_SR
        out_U[self._gone] = _by_unit(self._gone_OR * along_OR, self.unit_width).sum((0, 2))
        return out_U

    def _columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        return expand(self.kept, self.unit_width), expand(self._gone, self.unit_width)

    def _solve(self) -> None:
        """The folded weight and what the gradients need, for the gates as they stand."""
        units, width = self.weight_OI.shape[1] // self.unit_width, self.unit_width
        self._gone = torch.arange(units)[~torch.isin(torch.arange(units), self.kept)]
        kept, gone = self._columns()
        self._inverse_SS = torch.cholesky_inverse(
            torch.linalg.cholesky(self.gram_II[kept][:, kept])
        )
        between_SR = self.gram_II[kept][:, gone]
        self._absorb_SR = self._inverse_SS @ between_SR
        folded_OS = self.target_OI[:, kept] @ self._inverse_SS
        own_UBB = _diagonal_blocks(self._inverse_SS, width)
        self._kept_OS = _solve_units(own_UBB, folded_OS)
        schur_UBB = _diagonal_blocks(self.gram_II[gone][:, gone], width)
        schur_UBB = schur_UBB - torch.einsum(
            "sub,suc->ubc", _by_unit(between_SR, width), _by_unit(self._absorb_SR, width)
        )
        missing_OR = self.target_OI[:, gone] - folded_OS @ between_SR
        self._gone_OR = _solve_units(schur_UBB, missing_OR)
        # What the layer's error rises by without the unit, or falls by with it.
        self._worth_kept = _by_unit(self._kept_OS * folded_OS, width).sum((0, 2))
        self._worth_gone = _by_unit(self._gone_OR * missing_OR, width).sum((0, 2))
        self.effective_OI = torch.zeros_like(self.weight_OI)
        self.effective_OI[:, kept] = folded_OS if self.fold else self.weight_OI[:, kept]

    def _first_scores(self, units: int) -> torch.Tensor:
        """Ranks from 0 to 1, all kept units above all others."""
        ranks_U = torch.empty(units)
        ranks_U[self._gone] = self._worth_gone.argsort().argsort().float()
        ranks_U[self.kept] = self._worth_kept.argsort().argsort().float() + units - self.keep
        return ranks_U / units


def _by_unit(columns: torch.Tensor, width: int) -> torch.Tensor:
    return columns.view(len(columns), -1, width)


def _diagonal_blocks(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """[U, B, B]."""
    units = len(matrix) // width
    return matrix.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _solve_units(blocks_UBB: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Every unit's columns [O, B] times the inverse of its block."""
    by_unit_UBO = _by_unit(columns, blocks_UBB.shape[-1]).permute(1, 2, 0)
    return torch.linalg.solve(blocks_UBB, by_unit_UBO).permute(2, 0, 1).reshape(columns.shape)


def learn(
    model: PreTrainedModel,
    layers: dict[str, GatedLayer],
    ids_NL: torch.Tensor,
    settings: Gates,
    seed: int = 0,
) -> list[float]:
    """Train the scores of `layers`, by the full names of their modules; the KL of every step.

    The whole model is in memory, and activations of one window with it.
    """
    student = _Student(model, layers)
    optimizer = torch.optim.AdamW(
        [layer.scores_U for layer in layers.values()],
        settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, settings.steps)
    windows = _windows(len(ids_NL), settings, seed)
    losses, progress = [], tqdm(range(settings.steps), desc="gates", unit="step")
    for step in progress:
        losses.append(student.step(ids_NL[windows[step]]))
        for name, layer in layers.items():
            layer.scores_U.grad = layer.gradient(student.gradient(name))
        optimizer.step()
        schedule.step()
        new = sum(layer.choose() for layer in layers.values())
        progress.set_postfix(kl=f"{losses[-1]:.3f}", swapped=new)
        student.load()
    return losses


def _windows(num: int, settings: Gates, seed: int) -> torch.Tensor:
    """Indices [steps, windows], every window once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    count = settings.steps * settings.windows_per_step
    rounds = [torch.randperm(num, generator=generator) for _ in range(-(-count // num))]
    return torch.cat(rounds)[:count].view(settings.steps, -1)


class _Student:
    """The model with gated layers, beside the dense one; they share all other weights."""

    def __init__(self, model: PreTrainedModel, layers: dict[str, GatedLayer]) -> None:
        self._layers = layers
        self._teacher = model.requires_grad_(False)
        shared = {id(value): value for value in model.state_dict(keep_vars=True).values()}
        self._model: PreTrainedModel = copy.deepcopy(model, shared)
        self._transposed = family_of(model.config).transposed
        for name in layers:
            module = self._model.get_submodule(name)
            module.weight = nn.Parameter(torch.empty_like(module.weight))
        self._skeleton = without_blocks(model, family_of(model.config))
        self._last = passages(self._skeleton, family_of(model.config))[-1]
        self.load()

    def load(self) -> None:
        """Take over the effective weights of the layers."""
        for name, layer in self._layers.items():
            weight = self._weight(name)
            weight.grad = None
            effective = layer.effective_OI
            weight.data.copy_(effective.T if self._transposed else effective)

    def gradient(self, name: str) -> torch.Tensor:
        """Of the loss by a layer's effective weight [O, I]."""
        gradient = self._weight(name).grad
        assert gradient is not None
        return (gradient.T if self._transposed else gradient).float()

    def step(self, ids_NL: torch.Tensor) -> float:
        """Mean KL(dense || gated) over the windows; its gradient is left at the weights."""
        return sum(self._window(ids_1L, len(ids_NL)) for ids_1L in ids_NL.split(1))

    def _window(self, ids_1L: torch.Tensor, num: int) -> float:
        with torch.no_grad():
            dense_LD = self._stream(self._teacher, ids_1L)
        stream_LD = self._stream(self._model, ids_1L)
        gradient_LD, total = torch.empty_like(stream_LD), 0.0
        for start in range(0, len(stream_LD), TOKENS_AT_A_TIME):
            chunk = slice(start, start + TOKENS_AT_A_TIME)
            with torch.no_grad():
                log_p = torch.log_softmax(self._logits(dense_LD[chunk]).float(), -1)
            part_LD = stream_LD[chunk].detach().requires_grad_()
            log_q = torch.log_softmax(self._logits(part_LD).float(), -1)
            kl = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
            kl = kl / len(stream_LD) / num
            kl.backward()
            assert part_LD.grad is not None
            gradient_LD[chunk] = part_LD.grad
            total += kl.item()
        stream_LD.backward(gradient_LD)
        return total

    def _weight(self, name: str) -> nn.Parameter:
        return self._model.get_submodule(name).weight

    def _stream(self, model: PreTrainedModel, ids_1L: torch.Tensor) -> torch.Tensor:
        """The residual stream [L, D] behind the last block."""
        caught: list[torch.Tensor] = []
        last = model.get_submodule(family_of(model.config).layers)[-1]
        handle = last.register_forward_hook(lambda _, __, output: caught.append(output))
        try:
            model.base_model(ids_1L, use_cache=False)
        finally:
            handle.remove()
        return caught[0][0]

    def _logits(self, stream_LD: torch.Tensor) -> torch.Tensor:
        """By the model's own norm and head; no position looks at another there."""
        self._last.replacement = stream_LD[None]
        ids_1L = torch.zeros(1, len(stream_LD), dtype=torch.long)
        return self._skeleton(ids_1L, use_cache=False).logits[0]
