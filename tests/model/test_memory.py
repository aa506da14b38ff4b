"""What glibc keeps of freed memory goes back to the system."""

from __future__ import annotations

import platform

import psutil
import pytest
import torch

from hf_compress.model.memory import return_freed_memory

SIZE = 64 * 2**20
PIECE = 64 * 2**10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what was freed")
def test_freed_pieces_go_back() -> None:
    process = psutil.Process()
    return_freed_memory()
    pieces = [torch.ones(PIECE, dtype=torch.uint8) for _ in range(SIZE // PIECE)]
    last = torch.ones(PIECE, dtype=torch.uint8)  # so that the end of the heap stays in use
    del pieces
    kept = process.memory_info().rss
    return_freed_memory()
    assert process.memory_info().rss < kept - SIZE // 2
    assert last.sum() == PIECE
