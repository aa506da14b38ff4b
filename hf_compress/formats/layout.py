"""What a format has to offer: a grid to choose codes on, and how codes lie in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch

from hf_compress.formats.grid import Codes, Grid

Stored = dict[str, torch.Tensor]
"""Tensors of a checkpoint that one weight becomes, by what follows `X.` in their names, where
`X.weight` is the weight's."""


class Layout(Protocol):
    """One way to store the linear layers of a checkpoint in few bits."""

    tolerance: ClassVar[float | None]
    """As in `checkpoint.verify`: how far logits of the weights read back may be from those of
    the format's library; None where it computes with nothing but these weights."""
    transposed: ClassVar[bool]
    """Whether the library also quantizes layers that store their weights [in, out] (`Conv1D`)."""

    @staticmethod
    def library() -> Any:
        """The format's library.

        Raises:
            RecipeError: it is not installed.
        """
        ...

    def grid(self, dtype: torch.dtype) -> Grid:
        """What a weight of a model of this dtype may become."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Keys of `Stored` besides `weight`, of which one at least is there for every weight."""
        ...

    def fault(self, outputs: int, inputs: int) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""
        ...

    def shapes(self, outputs: int, inputs: int, dtype: torch.dtype) -> Stored:
        """What a weight becomes, on the meta device.

        Args:
            dtype: of the model, in which the weight is to be read back.
        """
        ...

    def pack(self, codes: Codes, dtype: torch.dtype) -> Stored:
        """The tensors that are stored; those of `shapes`."""
        ...

    def nearest(self, weight_OI: torch.Tensor) -> Stored:
        """The tensors that the format's own library makes of a weight, rounded to nearest;
        those of `shapes`."""
        ...

    def unpack(self, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
        """The weight [O, I] that the format's library reads."""
        ...

    def at_bits(self, bits: int) -> Layout:
        """The same with other bits a weight, for some layers of a checkpoint.

        Raises:
            RecipeError: the format has no such bits, or one for all layers.
        """
        ...

    def configuration(self, kept: list[str], layers: Mapping[str, Layout]) -> dict[str, Any]:
        """`quantization_config` of config.json.

        Args:
            kept: names of the linear layers that are not quantized.
            layers: this layout, or what it was `at_bits`, by names of the layers stored in it.
        """
        ...
