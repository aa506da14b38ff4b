"""Whether windows of token ids share text: by what they hold, and by where they lie in it.

Shapes: N and M windows, L tokens in a window.
"""

from __future__ import annotations

import torch

PASSAGE_TOKENS = 64
"""Two windows that share this many tokens in a row share text."""


def pieces(windows_NL: torch.Tensor, size: int) -> set[bytes]:
    """The passages of `size` tokens at multiples of `size`, as keys to compare."""
    usable = windows_NL.shape[1] // size * size
    return {piece.tobytes() for piece in windows_NL[:, :usable].reshape(-1, size).numpy()}


def touch(spans_N2: torch.Tensor, held_out_M2: torch.Tensor) -> torch.Tensor:
    """Which spans have a token in common with one of the held-out ones, bool [N]."""
    starts_M, stops_M = held_out_M2.sort(dim=0).values.T.contiguous()
    starts_N, stops_N = spans_N2.T.contiguous()
    begun_N = torch.searchsorted(starts_M, stops_N)
    ended_N = torch.searchsorted(stops_M, starts_N, right=True)
    return begun_N > ended_N


def share_passage(windows_NL: torch.Tensor, held_out_ML: torch.Tensor) -> torch.Tensor:
    """Which windows hold 64 tokens in a row, at any place, of a held-out one, bool [N]."""
    size = min(PASSAGE_TOKENS, windows_NL.shape[1], held_out_ML.shape[1])
    held_out = _rolling_hash(held_out_ML, size).flatten()
    # In parts, because the hashes of a whole text and their sorting need many times its memory.
    found = [
        torch.isin(_rolling_hash(part_NL, size), held_out).any(dim=1)
        for part_NL in windows_NL.split(1024)
    ]
    return torch.cat(found)


def _rolling_hash(windows_NL: torch.Tensor, size: int) -> torch.Tensor:
    """Polynomial hash, modulo 2^64, of each run of `size` tokens, int64 [N, L - size + 1]."""
    runs = windows_NL.shape[1] - size + 1
    hashes = torch.zeros(len(windows_NL), runs, dtype=torch.int64)
    for offset in range(size):
        hashes.mul_(6364136223846793005).add_(windows_NL[:, offset : offset + runs])
    return hashes
