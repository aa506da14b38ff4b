"""A teacher's distributions written down once, as draws, for students that come later.

Of each distribution some tokens are drawn, and how often each was drawn, over the number of
draws, stands for its probability: an unbiased estimate (Anshumann et al. 2025, sparse logit
sampling), which the teacher's few most likely tokens alone are not.

Legend: N windows, L tokens in a window, C tokens in a chunk, V vocabulary, K draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_compress.distillation.losses import CHUNK, Head
from hf_compress.distillation.trainer import head_input
from hf_compress.distillation.windows import WindowDataset
from hf_compress.errors import CheckpointError

DRAWS = 50
"""Of which about a dozen are distinct, of a language model on text."""


def draw(
    probabilities_CV: torch.Tensor, draws: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens drawn with replacement, each named once.

    Returns:
        Their ids, and how often each was drawn, int64 [C, draws]; where fewer are distinct, the
        rest is id 0, drawn 0 times.
    """
    drawn_CK = torch.multinomial(probabilities_CV, draws, replacement=True, generator=generator)
    drawn_CK = drawn_CK.sort(-1).values
    is_new_CK = torch.ones_like(drawn_CK)
    is_new_CK[:, 1:] = drawn_CK[:, 1:] != drawn_CK[:, :-1]
    place_CK = is_new_CK.cumsum(-1) - 1
    ids_CK = torch.zeros_like(drawn_CK).scatter_(-1, place_CK, drawn_CK)
    counts_CK = torch.zeros_like(drawn_CK).scatter_add_(-1, place_CK, torch.ones_like(drawn_CK))
    return ids_CK, counts_CK


def write_cache(
    folder: Path,
    teacher: PreTrainedModel,
    windows: WindowDataset,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> None:
    """Pass the windows once through the teacher, and write what is drawn as a `datasets` dataset.

    A row is a window: `input_ids`, `labels`, and the distinct tokens of all its positions one
    after the other (`ids`, `counts`), with how many each position has (`distinct`).

    Args:
        folder: for `datasets.load_from_disk`; it must not exist.
        draws: a token, at most 255.
    """
    import datasets

    generator = torch.Generator(teacher.device).manual_seed(seed)

    def rows() -> Iterator[dict[str, Any]]:
        for index in tqdm(range(len(windows)), desc="teacher", unit="window"):
            window = windows[index]
            ids_LK, counts_LK = _drawn(teacher, window["input_ids"], draws, generator)
            said_LK = counts_LK > 0
            yield {
                "input_ids": window["input_ids"].numpy(),
                "labels": window["labels"].numpy(),
                "ids": ids_LK[said_LK].numpy(),
                "counts": counts_LK[said_LK].numpy(),
                "distinct": said_LK.sum(-1).numpy(),
            }

    kinds = {"input_ids": "int32", "labels": "int32"}
    kinds |= {"ids": "int32", "counts": "uint8", "distinct": "uint8"}
    features = datasets.Features(
        {name: datasets.List(datasets.Value(kind)) for name, kind in kinds.items()}
    )
    # Written as it is made: neither the tensors of all windows nor a pickle of the teacher, by
    # which `from_generator` would name its file, are ever made.
    folder.mkdir(parents=True)
    path = folder / "data-00000-of-00001.arrow"
    with datasets.arrow_writer.ArrowWriter(path=str(path), features=features) as writer:
        for row in rows():
            writer.write(row)
        writer.finalize()
    written = datasets.Dataset.from_file(str(path))
    written.info.description = f"draws: {draws}"
    written.save_to_disk(str(folder / "dataset"))
    del written
    path.unlink()


class CachedDataset(Dataset[dict[str, torch.Tensor]]):
    """What `write_cache` wrote, row by row from disk, with `teacher_ids` and `teacher_weights`
    [L, K] for each position."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: the folder holds no such dataset.
        """
        import datasets

        try:
            self._rows = datasets.load_from_disk(str(folder / "dataset")).with_format("torch")
            self._draws = int(self._rows.info.description.removeprefix("draws: "))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} holds no cached teacher ({error}); write one with write_cache"
            ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self._rows[index]
        said_LK = torch.arange(self._draws) < row["distinct"][:, None]
        ids_LK = torch.zeros(said_LK.shape, dtype=torch.int64)
        weights_LK = torch.zeros(said_LK.shape)
        ids_LK[said_LK] = row["ids"].long()
        weights_LK[said_LK] = row["counts"].float() / self._draws
        return {
            "input_ids": row["input_ids"].long(),
            "labels": row["labels"].long(),
            "teacher_ids": ids_LK,
            "teacher_weights": weights_LK,
        }


@torch.no_grad()
def _drawn(
    teacher: PreTrainedModel, ids_L: torch.Tensor, draws: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and counts [L, K] of one window, on the CPU."""
    with head_input(teacher) as read:
        teacher(input_ids=ids_L[None].to(teacher.device), use_cache=False)
    hidden_LD = read[0][0]
    head = Head.of(teacher).to(hidden_LD.dtype)
    parts = [
        draw(torch.softmax(head.logits(chunk_CD), -1), draws, generator)
        for chunk_CD in hidden_LD.split(CHUNK)
    ]
    ids, counts = zip(*parts, strict=True)
    return torch.cat(ids).cpu(), torch.cat(counts).cpu()
