"""Prefill and decode speed of several models, measured in turns in one run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
from transformers import PreTrainedModel

ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """Tokens per second, batch 1; medians over the rounds."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    """None where nothing was decoded."""


@torch.no_grad()
def measure_speeds(
    models: list[PreTrainedModel], prompt_L: torch.Tensor, decode_tokens: int
) -> list[Speed]:
    """Speed of every model on one prompt; without tokens to decode, no KV cache is asked for.

    The models take turns within a round, so that whatever else the machine does hits all
    of them alike. A first round warms up and is not counted.
    """
    seconds: list[list[tuple[float, float]]] = [[] for _ in models]
    for round_number in range(ROUNDS + 1):
        for model, record in zip(models, seconds, strict=True):
            pair = _time(model.eval(), prompt_L[None].to(model.device), decode_tokens)
            if round_number:
                record.append(pair)
    return [
        Speed(
            len(prompt_L) / median(prefill for prefill, _ in record),
            decode_tokens / median(decode for _, decode in record) if decode_tokens else None,
        )
        for record in seconds
    ]


def _time(model: PreTrainedModel, ids_1L: torch.Tensor, decode_tokens: int) -> tuple[float, float]:
    start = _now(model)
    if not decode_tokens:
        model(ids_1L)
        return _now(model) - start, 0.0
    out = model(ids_1L, use_cache=True, logits_to_keep=1)
    middle = _now(model)
    for _ in range(decode_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return middle - start, _now(model) - middle


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
