"""bitsandbytes' own layouts: 4 bits (NF4, FP4) in blocks, and LLM.int8 by rows.

Nothing in them says that codes were rounded to nearest, so codes that make up for each other
load with plain `from_pretrained` and are read back exactly.

Dettmers et al. 2023 (QLoRA) derive the levels of NF4, Dettmers et al. 2022 LLM.int8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from hf_compress.errors import RecipeError
from hf_compress.formats.grid import Codes, Grid
from hf_compress.formats.layout import Layout, Stored

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
"""Scales that share a scale of their own in double quantization."""
ROWS = 32
"""Rows are a multiple of this, or the kernel for CPUs with AVX512-BF16 crashes."""
INT8_MAX = 127


def _library() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise RecipeError(
            "the formats nf4, fp4 and int8 need bitsandbytes, which is not installed: "
            'pip install "hf-compress[bitsandbytes]"'
        ) from error
    return bitsandbytes.functional


@dataclass(frozen=True)
class FourBit:
    """`quant_type` nf4 or fp4, a float32 scale for every block of columns; with
    `double_quant`, the scales are 8-bit codes themselves."""

    tolerance: ClassVar[float | None] = None
    transposed: ClassVar[bool] = True

    quant_type: Literal["nf4", "fp4"]
    block_size: int = 64
    double_quant: bool = False

    @staticmethod
    def library() -> Any:
        return _library()

    def grid(self, dtype: torch.dtype) -> Grid:
        levels_K, _ = self._levels()
        stored = self._nested if self.double_quant else _bfloat16
        return Grid(levels_K, self.block_size, stored=stored)

    def fault(self, outputs: int, inputs: int) -> str | None:
        if self.block_size not in BLOCK_SIZES:
            return f"block_size {self.block_size} is none of {', '.join(map(str, BLOCK_SIZES))}"
        if inputs % self.block_size:
            fitting = ", ".join(str(size) for size in BLOCK_SIZES if inputs % size == 0)
            return f"its {inputs} inputs are no multiple of block_size {self.block_size}" + (
                f"; {fitting} would do" if fitting else ""
            )
        if outputs % ROWS:
            return f"its {outputs} outputs are no multiple of {ROWS}, which kernels for CPUs need"
        return None

    def shapes(self, outputs: int, inputs: int, dtype: torch.dtype) -> Stored:
        blocks = outputs * inputs // self.block_size
        levels = torch.empty(16, device="meta")
        code = torch.empty(outputs * inputs // 2, 1, dtype=torch.uint8, device="meta")
        shapes = {"weight": code, "weight.quant_map": levels}
        scale_type = torch.uint8 if self.double_quant else torch.float32
        shapes["weight.absmax"] = torch.empty(blocks, dtype=scale_type, device="meta")
        if self.double_quant:
            nested = -(-blocks // NESTED_BLOCK)
            shapes["weight.nested_absmax"] = torch.empty(nested, device="meta")
            shapes["weight.nested_quant_map"] = torch.empty(256, device="meta")
        about = self._about((outputs, inputs), dtype, 0.0)
        shapes[self._about_name] = torch.empty(len(about), dtype=torch.uint8, device="meta")
        return shapes

    def pack(self, codes: Codes, dtype: torch.dtype) -> Stored:
        _, names_K = self._levels()
        code_F = names_K.to(codes.codes_OI.device)[codes.codes_OI.long()].flatten()
        packed = (code_F[::2] << 4 | code_F[1::2])[:, None]
        return self._stored(packed, codes.scale_OB, tuple(codes.codes_OI.shape), dtype)

    def nearest(self, weight_OI: torch.Tensor) -> Stored:
        packed, state = _library().quantize_4bit(
            weight_OI.contiguous(), blocksize=self.block_size, quant_type=self.quant_type
        )
        scale_OB = state.absmax.view(len(weight_OI), -1)
        return self._stored(packed, scale_OB, tuple(weight_OI.shape), weight_OI.dtype, exact=True)

    @property
    def parts(self) -> tuple[str, ...]:
        nested = ("weight.nested_absmax", "weight.nested_quant_map")
        return "weight.absmax", "weight.quant_map", *nested, self._about_name

    def unpack(self, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
        library = _library()
        parts = {name.removeprefix("weight."): part for name, part in stored.items()}
        packed = parts.pop("weight")
        state = library.QuantState.from_dict(parts, packed.device)
        state.dtype = dtype
        return library.dequantize_4bit(packed, state)

    def at_bits(self, bits: int) -> Layout:
        raise _unmixed()

    def configuration(self, kept: list[str], layers: Mapping[str, Layout]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": kept,
        }

    @property
    def _about_name(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.quant_type}"

    def _levels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels in ascending order, and the code (uint8) that bitsandbytes gives each."""
        levels_K, codes_K = self._map().sort(stable=True)
        # FP4 has two zeros, of which one is enough.
        new_K = torch.cat([torch.tensor([True]), levels_K.diff() > 0])
        return levels_K[new_K], codes_K[new_K].to(torch.uint8)

    def _map(self) -> torch.Tensor:
        return _library().get_4bit_type(self.quant_type, device="cpu")

    def _stored(
        self,
        packed: torch.Tensor,
        scale_OB: torch.Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        exact: bool = False,
    ) -> Stored:
        """The tensors of one weight; `exact` scales are not rounded to bfloat16."""
        offset = 0.0
        stored = {"weight": packed, "weight.quant_map": self._map()}
        if self.double_quant:
            codes, state, mean = self._nest(scale_OB)
            offset = mean.item()
            stored["weight.absmax"] = codes
            stored["weight.nested_absmax"] = state.absmax
            stored["weight.nested_quant_map"] = state.code
        else:
            stored["weight.absmax"] = (scale_OB if exact else _bfloat16(scale_OB)).flatten()
        about = self._about(shape, dtype, offset)
        stored[self._about_name] = torch.frombuffer(bytearray(about), dtype=torch.uint8)
        return stored

    def _nest(self, scale_OB: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor]:
        flat = scale_OB.flatten()
        mean = flat.mean()
        codes, state = _library().quantize_blockwise(flat - mean, blocksize=NESTED_BLOCK)
        return codes, state, mean

    def _nested(self, scale_OB: torch.Tensor) -> torch.Tensor:
        codes, state, mean = self._nest(scale_OB)
        read = _library().dequantize_blockwise(codes, state) + mean
        return read.view_as(scale_OB)

    def _about(self, shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> bytes:
        """The JSON that goes with a weight; as long for any offset, for a shard's header is
        written before the codes are known."""
        about: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
        }
        if self.double_quant:
            about |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
            return json.dumps({**about, "nested_offset": offset}).ljust(200).encode()
        return json.dumps(about).encode()


@dataclass(frozen=True)
class EightBit:
    """LLM.int8: a float32 scale for every row. bitsandbytes rounds the inputs of such a layer
    as well, all but outliers."""

    tolerance: ClassVar[float | None] = 0.1
    transposed: ClassVar[bool] = True

    @staticmethod
    def library() -> Any:
        return _library()

    def grid(self, dtype: torch.dtype) -> Grid:
        return Grid(torch.arange(-INT8_MAX, INT8_MAX + 1) / INT8_MAX)

    def fault(self, outputs: int, inputs: int) -> str | None:
        return None

    def shapes(self, outputs: int, inputs: int, dtype: torch.dtype) -> Stored:
        return {
            "weight": torch.empty(outputs, inputs, dtype=torch.int8, device="meta"),
            "SCB": torch.empty(outputs, device="meta"),
            "weight_format": torch.empty((), dtype=torch.uint8, device="meta"),
        }

    def pack(self, codes: Codes, dtype: torch.dtype) -> Stored:
        rows_OI = (codes.codes_OI.to(torch.int16) - INT8_MAX).to(torch.int8)
        return _eight_bit(rows_OI, codes.scale_OB[:, 0])

    def nearest(self, weight_OI: torch.Tensor) -> Stored:
        # In float16, as bitsandbytes does it.
        rows_OI, scale_O, _ = _library().int8_vectorwise_quant(weight_OI.half().contiguous())
        return _eight_bit(rows_OI, scale_O)

    @property
    def parts(self) -> tuple[str, ...]:
        return "SCB", "weight_format"

    def unpack(self, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
        return _library().int8_vectorwise_dequant(stored["weight"], stored["SCB"]).to(dtype)

    def at_bits(self, bits: int) -> Layout:
        raise _unmixed()

    def configuration(self, kept: list[str], layers: Mapping[str, Layout]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": kept,
        }


def read(configuration: dict[str, Any]) -> FourBit | EightBit | None:
    """The layout of a checkpoint with this `quantization_config`, if it is bitsandbytes'."""
    if configuration.get("quant_method") != "bitsandbytes":
        return None
    if configuration.get("load_in_8bit"):
        return EightBit()
    # Block size and double quantization are said beside every weight.
    return FourBit(configuration["bnb_4bit_quant_type"])


def _unmixed() -> RecipeError:
    return RecipeError(
        "bits: bitsandbytes stores all layers of a checkpoint in the same bits; take bits out, or "
        "choose a format that mixes, as W4A16"
    )


def _eight_bit(rows_OI: torch.Tensor, scale_O: torch.Tensor) -> Stored:
    weight_format = torch.tensor(0, dtype=torch.uint8)
    return {"weight": rows_OI, "SCB": scale_O.float(), "weight_format": weight_format}


def _bfloat16(scale_OB: torch.Tensor) -> torch.Tensor:
    """The fused kernel for CPUs reads scales in bfloat16; such ones are the same everywhere."""
    return scale_OB.bfloat16().float()
