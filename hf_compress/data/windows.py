"""Documents -> windows of token ids, packed without padding.

No window is in two of the three sets. Evaluation windows are chosen first; what else is drawn
from the same text lies elsewhere in it, and a candidate for calibration or fitness that repeats
a passage of an evaluation window is left out, whatever text it comes from.

Shapes: N windows, L tokens in a window, T tokens in a whole text.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_compress.data.chat import added_bos, batches, render
from hf_compress.data.overlap import PASSAGE_TOKENS, pieces, share_passage, touch
from hf_compress.data.sources import (
    Document,
    describe,
    read_documents,
    same_text,
    source_kind,
)
from hf_compress.errors import DataError
from hf_compress.recipe import Data, Evaluation, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 50_000_000
"""Where reading a text stops; some 12 million tokens."""

OVERSAMPLING = 4
"""Of a stream, this many times the wanted tokens are read, so that there is a choice."""

_LESS_OR_MORE = "lower num_samples or max_seq_length, or give more text"


@dataclass(frozen=True)
class Windows:
    """Token ids for every purpose; no window is in two of the three sets."""

    calibration: torch.Tensor
    """int64 [num_samples, max_seq_length]"""
    fitness: torch.Tensor
    """int64 [num_fitness_samples, max_seq_length]"""
    evaluation: torch.Tensor
    """int64 [num_samples, max_seq_length], both of the evaluation"""


@dataclass(frozen=True)
class _Pool:
    """Distinct windows of one text, and the tokens [start, stop) that each covers of it."""

    windows_NL: torch.Tensor
    spans_N2: torch.Tensor

    def __len__(self) -> int:
        return len(self.windows_NL)

    def __getitem__(self, index: torch.Tensor) -> _Pool:
        return _Pool(self.windows_NL[index], self.spans_N2[index])


@dataclass(frozen=True)
class _Text:
    """A source, and the texts that a caller gave in its place."""

    source: TextSource
    texts: Iterable[Document] | None
    role: str

    @property
    def is_self(self) -> bool:
        return self.texts is None and self.source.source == "self"

    @property
    def is_stream(self) -> bool:
        """Whether reading it to the end could take forever."""
        if self.texts is not None:
            return not isinstance(self.texts, Sized)
        return source_kind(self.source) == "hub"

    def describe(self) -> str:
        return describe(self.source) if self.texts is None else f"{self.role}_texts"

    def needed(self, num_windows: int) -> int:
        """Tokens in that many windows."""
        return num_windows * self.source.max_seq_length

    def documents(self) -> Iterator[Document]:
        if self.is_self:
            raise DataError(
                "the evaluation source cannot be `self`: text that the model wrote says nothing "
                "about what it lost; use `python-docs`, a local file or a Hub dataset"
            )
        if self.texts is None:
            return read_documents(self.source)
        if isinstance(self.texts, str):
            raise DataError(f"{self.role}_texts is one string; give a list of texts: [text]")
        return (document for document in self.texts if document)

    def is_same_as(self, other: _Text) -> bool:
        """Whether both read the same text; raises DataError where they render it differently."""
        if self.texts is not None or other.texts is not None:
            same = self.texts is other.texts
        else:
            same = same_text(self.source, other.source)
        if same and self.source.chat_template != other.source.chat_template:
            raise DataError(
                f"calibration and evaluation both read {other.describe()}, only one of them "
                "with chat_template, so the two cannot be kept apart; set it alike for both"
            )
        return same


def load_windows(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    sample: Callable[[int, int], torch.Tensor] | None = None,
    calibration_texts: Iterable[Document] | None = None,
    evaluation_texts: Iterable[Document] | None = None,
) -> Windows:
    """Cut the sources of `data` into windows of token ids.

    Where the tokenizer starts a text with BOS by itself, every window starts with BOS, so
    that attention sinks look as they do in use; otherwise windows are plain cuts.

    Args:
        data: the sources, and how many windows of which length.
        tokenizer: the model's.
        seed: decides which windows are for calibration and for fitness. Those for
            evaluation are spread evenly over their text and do not depend on it.
        sample: `sample(num, length)` returns int64 [num, length] of the model's own text;
            needed where the calibration source is `self`.
        calibration_texts: texts or conversations used instead of the calibration source.
        evaluation_texts: the same for the evaluation source.

    Raises:
        DataError: a source cannot be read, gives too few windows, or two of the three sets
            share text.
    """
    calibration = _Text(data.calibration, calibration_texts, "calibration")
    evaluation = _Text(data.evaluation, evaluation_texts, "evaluation")
    wanted = data.calibration.num_samples + data.num_fitness_samples
    if calibration.is_self:
        held_out = _spread(_cut(evaluation, tokenizer), evaluation)
        drawn_NL = _sampled(sample, wanted, calibration.source.max_seq_length)
    else:
        held_out, free = _split(calibration, evaluation, tokenizer, wanted)
        drawn_NL = _draw(free, wanted, seed).windows_NL
    windows = Windows(
        calibration=drawn_NL[: data.calibration.num_samples],
        fitness=drawn_NL[data.calibration.num_samples :],
        evaluation=held_out.windows_NL,
    )
    check_disjoint(windows, calibration.describe(), evaluation.describe())
    return windows


def load_training_windows(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    windows: Windows,
    num: int,
    *,
    sample: Callable[[int, int], torch.Tensor] | None = None,
    calibration_texts: Iterable[Document] | None = None,
    evaluation_texts: Iterable[Document] | None = None,
) -> torch.Tensor:
    """Windows to train on: those for calibration, then more of the calibration text that shares
    nothing with them, nor with those for fitness and evaluation.

    Args:
        windows: of `load_windows` with the same other arguments.
        num: windows wanted.
        sample: writes other text than it did for `windows`.

    Returns:
        int64 [at most num, max_seq_length]; fewer where the text has no more.
    """
    calibration = _Text(data.calibration, calibration_texts, "calibration")
    evaluation = _Text(data.evaluation, evaluation_texts, "evaluation")
    more = num - len(windows.calibration)
    if more <= 0:
        return windows.calibration[:num]
    if calibration.is_self:
        drawn_NL = _sampled(sample, more, calibration.source.max_seq_length)
    else:
        known = len(windows.calibration) + len(windows.fitness)
        _, free = _split(calibration, evaluation, tokenizer, known, welcome=more)
        drawn_NL = _draw(free, len(free), seed).windows_NL
    taken_N = torch.zeros(len(drawn_NL), dtype=torch.bool)
    for others_ML in (windows.calibration, windows.fitness, windows.evaluation):
        taken_N |= share_passage(drawn_NL, others_ML)
    return torch.cat([windows.calibration, drawn_NL[~taken_N][:more]])


def load_evaluation_windows(
    data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, other: Evaluation | None = None
) -> torch.Tensor:
    """The evaluation windows of `load_windows`, without any text written by the model for it.

    Args:
        data, tokenizer, seed: as `load_windows` had them.
        other: a text, or a cut of one, instead of the evaluation of `data`. It shares nothing
            with the windows for calibration and fitness (of `self` and `texts`, which are
            not at hand, nothing is left out).

    Returns:
        int64 [num_samples, max_seq_length], both of the evaluation.
    """
    calibration = _Text(data.calibration, None, "calibration")
    text = _Text(other or data.evaluation, None, "evaluation")
    wanted = data.calibration.num_samples + data.num_fitness_samples
    if other is None or calibration.source.source in ("self", "texts"):
        # Calibration only decides how far a stream is read; its text need not be at hand.
        may_share = text.is_stream and calibration.source.source == text.source.source
        same = may_share and calibration.is_same_as(text)
        pool = _cut(text, tokenizer, calibration.needed(wanted) if same else 0)
        return _spread(pool, text).windows_NL
    own = _Text(data.evaluation, None, "evaluation")
    used = _draw(_split(calibration, own, tokenizer, wanted)[1], wanted, seed)
    same = calibration.is_same_as(text)
    pool = _cut(text, tokenizer, calibration.needed(wanted) if same else 0)
    return _spread(_apart(pool, used, same), text).windows_NL


def check_disjoint(windows: Windows, calibration: str, evaluation: str) -> None:
    """Raise DataError where two of the three sets share a window.

    Windows of unlike length are compared by their passages of 64 tokens, at multiples of 64.

    Args:
        windows: the three sets.
        calibration: name of the text that calibration and fitness come from.
        evaluation: name of the text that evaluation comes from.
    """
    named = [
        ("calibration", calibration, windows.calibration),
        ("fitness", calibration, windows.fitness),
        ("evaluation", evaluation, windows.evaluation),
    ]
    for (a, text_a, ids_a), (b, text_b, ids_b) in itertools.combinations(named, 2):
        length_a, length_b = ids_a.shape[1], ids_b.shape[1]
        size = length_a if length_a == length_b else min(PASSAGE_TOKENS, length_a, length_b)
        shared = len(pieces(ids_a, size) & pieces(ids_b, size))
        if shared:
            raise DataError(
                f"the {a} windows ({text_a}) and the {b} windows ({text_b}) share {shared} "
                f"passages of {size} tokens; what is measured has to be kept apart from what "
                "is calibrated on: use another text for one of them"
            )


def _split(
    calibration: _Text,
    evaluation: _Text,
    tokenizer: PreTrainedTokenizerBase,
    wanted: int,
    welcome: int = 0,
) -> tuple[_Pool, _Pool]:
    """The evaluation windows, and at least `wanted` windows that share no text with them; a
    stream is read far enough for `welcome` more."""
    same = calibration.is_same_as(evaluation)
    needed = calibration.needed(wanted + welcome)
    needed_held_out = evaluation.needed(evaluation.source.num_samples)
    evaluation_T = _tokens(evaluation, tokenizer, needed_held_out + (needed if same else 0))
    held_out = _spread(_pack(evaluation_T, evaluation, tokenizer), evaluation)
    calibration_T = evaluation_T if same else _tokens(calibration, tokenizer, needed)
    pool = _pack(calibration_T, calibration, tokenizer)
    free = _apart(pool, held_out, same)
    if len(free) < wanted:
        left_out = f" that share no text with the evaluation windows ({evaluation.describe()})"
        raise DataError(
            f"{calibration.describe()} gives {len(free)} windows of "
            f"{calibration.source.max_seq_length} tokens"
            f"{left_out if len(free) < len(pool) else ''}, and "
            f"{wanted} were asked for (calibration and fitness); {_LESS_OR_MORE}"
        )
    return held_out, free


def _cut(text: _Text, tokenizer: PreTrainedTokenizerBase, more: int = 0) -> _Pool:
    """All windows of a text; a stream is read for its `num_samples` windows and `more` tokens."""
    needed = text.needed(text.source.num_samples) + more
    return _pack(_tokens(text, tokenizer, needed), text, tokenizer)


def _spread(pool: _Pool, evaluation: _Text) -> _Pool:
    """As many windows as asked for, evenly spaced over the text."""
    asked = evaluation.source.num_samples
    if len(pool) < asked:
        raise DataError(
            f"{evaluation.describe()} gives {len(pool)} windows of "
            f"{evaluation.source.max_seq_length} tokens, and {asked} were asked for "
            f"(evaluation); {_LESS_OR_MORE}"
        )
    return pool[torch.arange(asked) * (len(pool) // asked)]


def _draw(pool: _Pool, num: int, seed: int) -> _Pool:
    generator = torch.Generator().manual_seed(seed)
    return pool[torch.randperm(len(pool), generator=generator)[:num]]


def _sampled(
    sample: Callable[[int, int], torch.Tensor] | None, num: int, length: int
) -> torch.Tensor:
    if sample is None:
        raise DataError(
            "the calibration source `self` needs the model to write text, and no model was "
            "given; pass `sample`, or use `python-docs`, a local file or a Hub dataset"
        )
    windows_NL = sample(num, length)
    if windows_NL.shape != (num, length):
        raise DataError(
            f"`sample` returned the shape {tuple(windows_NL.shape)}, and windows of "
            f"{(num, length)} were asked for; return int64 [num, length]"
        )
    return windows_NL.to("cpu", torch.int64)


def _tokens(text: _Text, tokenizer: PreTrainedTokenizerBase, needed: int) -> torch.Tensor:
    """Token ids of the documents one after the other, int64 [T].

    A stream is read until `needed` tokens leave a choice; anything else is read to its end.
    What the tokenizer adds to a text by default, such as BOS, is at every document.
    """
    chat = text.source.chat_template
    pieces, tokens, characters = [torch.empty(0, dtype=torch.int64)], 0, 0
    for documents in batches(text.documents()):
        rendered = [render(document, tokenizer, chat) for document in documents]
        # A chat template writes its own BOS; verbose would warn about long documents.
        encoded = tokenizer(rendered, add_special_tokens=not chat, verbose=False)["input_ids"]
        pieces += [torch.tensor(ids, dtype=torch.int64) for ids in encoded]
        tokens += sum(map(len, encoded))
        characters += sum(map(len, rendered))
        if text.is_stream and tokens >= OVERSAMPLING * needed:
            break
        if characters >= MAX_CHARACTERS:
            logger.warning(
                "read the first %d characters of %s; what follows is not used",
                characters,
                text.describe(),
            )
            break
    if not tokens:
        raise DataError(f"{text.describe()} holds no text; give one that does")
    return torch.cat(pieces)


def _pack(tokens_T: torch.Tensor, text: _Text, tokenizer: PreTrainedTokenizerBase) -> _Pool:
    """Cut a text into windows; a window that was there before, and the rest, are dropped."""
    length, bos = text.source.max_seq_length, added_bos(tokenizer)
    windows, spans, seen = [], [], set()
    start = 0
    while start < len(tokens_T):
        prefix = tokens_T[:0]
        if bos is not None and tokens_T[start] != bos:
            prefix = torch.tensor([bos])
        stop = start + length - len(prefix)
        if stop > len(tokens_T):
            break
        window_L = torch.cat([prefix, tokens_T[start:stop]])
        key = window_L.numpy().tobytes()
        if key not in seen:
            seen.add(key)
            windows.append(window_L)
            spans.append((start, stop))
        start = stop
    if not windows:
        return _Pool(tokens_T.new_empty(0, length), tokens_T.new_empty(0, 2))
    return _Pool(torch.stack(windows), torch.tensor(spans))


def _apart(pool: _Pool, others: _Pool, same_text: bool) -> _Pool:
    """What shares neither a passage nor, in the same text, a token with the others."""
    taken_N = share_passage(pool.windows_NL, others.windows_NL)
    if same_text:
        taken_N |= touch(pool.spans_N2, others.spans_N2)
    return pool[~taken_N]
