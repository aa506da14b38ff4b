"""Documents as the text to tokenize; conversations through the tokenizer's chat template."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jinja2
import torch

from hf_compress.data.sources import Document
from hf_compress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_BATCH = 64


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of BOS where the tokenizer starts every text with it by itself, else None; for
    some encoders CLS is what others call BOS."""
    first = tokenizer("a")["input_ids"][:1]
    starts = tokenizer.bos_token_id, tokenizer.cls_token_id
    return first[0] if first and first[0] in starts else None


def answers(ids_NL: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Which tokens of packed conversations an assistant wrote, the token that ends its turn
    included; of a turn that began before the window, none. bool [N, L].

    Raises:
        DataError: the chat template does not set an assistant's turn off by special tokens.
    """
    question, answer = "Why", "Because"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = _converse(messages, tokenizer)
    between, found, behind = text.partition(question)[2].partition(answer)
    start, end = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (between, behind)
    )
    special = set(tokenizer.all_special_ids)
    end = [token for token in end if token in special][:1]
    if not (found and end and special & set(start)):
        raise DataError(
            "the chat template sets an assistant's turn off by no special tokens (it writes "
            f"{text!r}), so where answers begin and end cannot be told; leave completion_only out"
        )
    mask_NL = torch.zeros_like(ids_NL, dtype=torch.bool)
    if len(start) >= ids_NL.shape[1]:
        return mask_NL
    begins_NS = (ids_NL.unfold(1, len(start), 1) == torch.tensor(start)).all(-1)
    for row, column in begins_NS.nonzero().tolist():
        rest_L = ids_NL[row, column + len(start) :]
        stops = (rest_L == end[0]).nonzero().flatten().tolist()
        length = stops[0] + 1 if stops else len(rest_L)
        mask_NL[row, column + len(start) :][:length] = True
    return mask_NL


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(documents, DOCUMENTS_PER_BATCH)):
        yield batch


def render(document: Document, tokenizer: PreTrainedTokenizerBase, chat: bool) -> str:
    """A document as the text to tokenize, with what sets it off from the next one."""
    if chat:
        return _converse(document, tokenizer)
    if isinstance(document, str):
        return document + "\n\n"
    raise DataError(
        f"a document is a {type(document).__name__}, not text; "
        "for lists of messages set chat_template: true"
    )


def _converse(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            "chat_template is true, and the tokenizer has no chat template; set it to false, "
            "or give the tokenizer of a chat model"
        )
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
    try:
        if not all("role" in message for message in messages):
            raise ValueError(f"a message without a role: {messages!r:.200}")
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"the chat template refuses a conversation: {error}; a conversation is a list of "
            "objects with the keys `role` and `content`, in an order that the template knows"
        ) from error
