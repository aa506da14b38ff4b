"""Documents as the text to tokenize; conversations through the tokenizer's chat template."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jinja2

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
