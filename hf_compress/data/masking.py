"""What a masked language model is asked: to say what stood where a mask stands now.

Legend: N windows, L tokens in a window.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from hf_compress.errors import DataError
from hf_compress.model.divergence import UNASKED, Questions

MASKED_SHARE = 0.15
"""Of the tokens of a window, as in BERT's training (Devlin et al. 2019, section 3.1); every one
of them becomes the mask token."""


def masked_tokens(ids_NL: torch.Tensor, tokenizer: PreTrainedTokenizerBase, seed: int) -> Questions:
    """Hide the same number of tokens in every window, drawn at random; special tokens stay.

    Args:
        ids_NL: token ids.
        tokenizer: knows the mask token and the special ones.
        seed: decides which tokens are hidden.

    Returns:
        Questions about the hidden tokens; every position may be compared.

    Raises:
        DataError: the tokenizer has no mask token, or a window has too few ordinary tokens.
    """
    if tokenizer.mask_token_id is None:
        raise DataError(
            "the tokenizer has no mask token, and a masked language model is measured by what it "
            "says in its place; give the tokenizer that belongs to the model"
        )
    hidden = max(1, round(MASKED_SHARE * ids_NL.shape[1]))
    order_NL = torch.rand(ids_NL.shape, generator=torch.Generator().manual_seed(seed))
    ordinary_NL = torch.isin(ids_NL, torch.tensor(tokenizer.all_special_ids), invert=True)
    fewest = int(ordinary_NL.sum(-1).min())
    if fewest < hidden:
        raise DataError(
            f"a window has only {fewest} tokens that are not special, and {hidden} are to be "
            "masked in each; give other text, or longer documents"
        )
    order_NL[~ordinary_NL] = torch.inf
    chosen_NK = order_NL.argsort(-1)[:, :hidden]
    asked_NL = torch.zeros_like(ordinary_NL).scatter_(1, chosen_NK, True)
    return Questions(
        ids_NL.masked_fill(asked_NL, tokenizer.mask_token_id), ids_NL.where(asked_NL, UNASKED)
    )
