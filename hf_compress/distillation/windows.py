"""Windows of token ids as what a Trainer reads.

Shapes: N windows, L tokens in a window.
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from hf_compress.model.divergence import UNASKED


class WindowDataset(Dataset[dict[str, torch.Tensor]]):
    """Packed windows, all of whose tokens but the first, which nothing predicts, count.

    Args:
        ids_NL: token ids.
        asked_NL: where given, the tokens whose prediction counts.
    """

    def __init__(self, ids_NL: torch.Tensor, asked_NL: torch.Tensor | None = None) -> None:
        self.ids_NL = ids_NL
        self.labels_NL = ids_NL.clone()
        if asked_NL is not None:
            self.labels_NL[~asked_NL] = UNASKED
        # So that whoever counts labels, as the Trainer does, counts predictions.
        self.labels_NL[:, 0] = UNASKED

    def __len__(self) -> int:
        return len(self.ids_NL)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids_NL[index], "labels": self.labels_NL[index]}
