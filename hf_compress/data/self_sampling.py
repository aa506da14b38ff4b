"""Windows that the model writes itself: calibration text where none is at hand.

The loop is our own and not `generate`, so that the seed alone decides every token, the
global random state stays as it was, and a document goes on after EOS to its full length.

Shapes: B documents in a batch, L tokens in a document, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from hf_compress.data.chat import added_bos
from hf_compress.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DOCUMENT_LENGTH = 128
"""Tokens that the model writes before it starts afresh. Drawn from the whole distribution, a
small model loses its thread; measured (SmolLM2-135M pruned by 30 %), KL on other text is .77
with documents of 64 to 128 tokens, .88 with 512."""
BURN_IN = 8
"""Tokens that a document's random start is given to become text, and that are dropped."""


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num: int,
    length: int,
    seed: int,
    *,
    batch_size: int = 128,
    temperature: float = 1.0,
    burn_in: int = BURN_IN,
    progress: bool = True,
) -> torch.Tensor:
    """Text sampled from the whole distribution of the model, without top-k or top-p.

    A window is packed with documents of `DOCUMENT_LENGTH` tokens, and starts with BOS where
    the tokenizer adds it by itself. The model starts a document from one ordinary token drawn
    at random (after BOS, if any); no two have the same one while the vocabulary lasts.

    Args:
        model: a causal language model; it computes on its own device, in eval mode.
        tokenizer: the model's; ids beyond its vocabulary are never sampled.
        num: windows.
        length: tokens in a window.
        seed: decides every token. `batch_size` does not, up to rounding.
        batch_size: documents that are written at once, each with its own KV cache.
        temperature: divides the logits; 1.0 is the model's own distribution.
        burn_in: first tokens of a document that are not kept.
        progress: show a bar, in tokens.

    Returns:
        int64 [num, length], on the CPU.

    Raises:
        DataError: an argument is out of range.
        ModelError: the model's logits are not finite.
    """
    if min(num, length, batch_size) < 1 or burn_in < 0 or not temperature > 0:
        raise DataError(
            f"cannot sample num={num} windows of length={length} with batch_size={batch_size}, "
            f"burn_in={burn_in} and temperature={temperature}; all but burn_in, which may be 0, "
            "have to be positive"
        )
    bos = added_bos(tokenizer)
    start = torch.full((num, 0 if bos is None else 1), bos or 0)
    missing = length - start.shape[1]
    pieces = -(-missing // DOCUMENT_LENGTH)
    if pieces == 0:
        return start
    documents_KP = _sample_documents(
        model,
        tokenizer,
        num * pieces,
        burn_in + min(missing, DOCUMENT_LENGTH),
        seed,
        batch_size,
        temperature,
        progress,
    )[:, start.shape[1] + burn_in :]
    return torch.cat([start, documents_KP.reshape(num, -1)[:, :missing]], 1)


def _sample_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num: int,
    length: int,
    seed: int,
    batch_size: int,
    temperature: float,
    progress: bool,
) -> torch.Tensor:
    """BOS, if any, and `length` tokens of each document."""
    generator = torch.Generator().manual_seed(seed)
    prompts_NP = _prompts(model, tokenizer, num, generator)
    length += prompts_NP.shape[1] - 1
    # Drawn ahead and on the CPU, so that neither the device nor the batch size decides.
    uniform_NL = torch.rand(num, length, generator=generator)
    with torch.no_grad(), _eval_mode(model), _bar(num * length, progress) as bar:
        batches = [
            _continue(model, prompts_BP, uniform_BL, len(tokenizer), temperature, bar)
            for prompts_BP, uniform_BL in zip(
                prompts_NP.split(batch_size), uniform_NL.split(batch_size), strict=True
            )
        ]
    return torch.cat(batches)


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _bar(num_tokens: int, shown: bool) -> tqdm:
    return tqdm(
        total=num_tokens,
        desc="sampling",
        unit="tok",
        unit_scale=True,
        leave=False,
        disable=not shown,
    )


def _prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """BOS, if any, and one ordinary token; int64 [num, 1 or 2]."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    embedded = model.get_input_embeddings().get_parameter("weight").shape[0]
    ordinary = sorted(i for i in set(tokenizer.get_vocab().values()) - special if i < embedded)
    order = torch.randperm(len(ordinary), generator=generator)
    first_N1 = torch.tensor(ordinary)[order[torch.arange(num) % len(ordinary)]][:, None]
    bos = added_bos(tokenizer)
    return first_N1 if bos is None else torch.cat([torch.full_like(first_N1, bos), first_N1], 1)


def _continue(
    model: PreTrainedModel,
    prompts_BP: torch.Tensor,
    uniform_BL: torch.Tensor,
    vocab_size: int,
    temperature: float,
    bar: tqdm,
) -> torch.Tensor:
    """Write on to the length of `uniform_BL`; int64 [B, L] on the CPU."""
    device = model.device
    num, length = uniform_BL.shape
    windows_BL = torch.empty(num, length, dtype=torch.int64, device=device)
    written = prompts_BP.shape[1]
    windows_BL[:, :written] = prompts_BP.to(device)
    uniform_BL = uniform_BL.to(device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    bar.update(num * written)
    new_BT, cache = windows_BL[:, :written], None
    for position in range(written, length):
        output = model(input_ids=new_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits_BV = output.logits[:, -1, :vocab_size].to(device)
        finite &= logits_BV.amax(dim=-1).isfinite().all()  # -inf is only a ban
        new_BT = _choose(logits_BV.float() / temperature, uniform_BL[:, position, None])
        windows_BL[:, position] = new_BT[:, 0]
        bar.update(num)
    if not finite:
        raise ModelError(
            "the model's logits are not all finite while it writes text; load it in float32 or "
            "bfloat16, or calibrate on a text instead of `self`"
        )
    return windows_BL.cpu()


def _choose(logits_BV: torch.Tensor, uniform_B1: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative distribution at a number in [0, 1); int64 [B, 1]."""
    cumulative_BV = logits_BV.softmax(dim=-1).cumsum(dim=-1)
    threshold_B1 = uniform_B1 * cumulative_BV[:, -1:]
    chosen_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True)
    # Rounding may put the threshold at the very end.
    return chosen_B1.clamp_(max=logits_BV.shape[1] - 1)
