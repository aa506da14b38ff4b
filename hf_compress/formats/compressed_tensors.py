"""compressed-tensors' `pack-quantized` layout, which vLLM's kernels read: weights in 3, 4 or 8
bits (W3A16, W4A16, W8A16), dense in 32-bit words, a scale in the model's dtype for every group
of columns or every row.

Facts that tests/quantization/test_compressed_tensors.py pins (transformers 5.23,
compressed-tensors 0.20):

- 3, 4 and 8 bits load exactly. `int-quantized` is not needed: weight-only 8 bits in it load only
  where the format stands in their group, and vLLM has no kernel for them.
- Symmetric only: with zero points a checkpoint does not load.
- transformers writes all weights out in the model's dtype at the first forward, and saves them
  so afterwards. With `dequantize=True` it reads every layer by the first group: mixed bits come
  out wrong, or not at all.
- vLLM computes layers that it fuses (q, k and v; gate and up) by the first one's group, and looks
  for a class's name before it looks at parts of fused layers: mixed groups list layers by name.
- Embeddings stay as they are. Packed, an embedding (tied or not) does not load, nor a head that
  is tied. As bytes, in an `int-quantized` group that names both, the two load exactly, the codes
  stored once and the scales for each (tests/quantization/test_tied.py); but vLLM has no kernel
  for that group, and transformers holds both written out after the first forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from hf_compress.errors import RecipeError
from hf_compress.formats.grid import Codes, Grid
from hf_compress.formats.layout import Layout, Stored

BITS = (3, 4, 8)
FORMAT = "pack-quantized"
WORD = 32
"""Bits of a packed word; so many columns fill whole words at any number of bits."""


def _library() -> Any:
    try:
        import compressed_tensors.compressors.pack_quantized
        import compressed_tensors.quantization.utils
    except ImportError as error:
        raise RecipeError(
            f"the formats {', '.join(f'W{bits}A16' for bits in BITS)} need compressed-tensors, "
            'which is not installed: pip install "hf-compress[compressed-tensors]"'
        ) from error
    return compressed_tensors


@dataclass(frozen=True)
class Packed:
    """Integers of `bits` bits around zero, and a scale for every `group_size` columns; for every
    row where that is None."""

    tolerance: ClassVar[float | None] = None
    transposed: ClassVar[bool] = False

    bits: int
    group_size: int | None = None

    @staticmethod
    def library() -> Any:
        return _library()

    def grid(self, dtype: torch.dtype) -> Grid:
        half = 2 ** (self.bits - 1)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps

        def stored(scale_OB: torch.Tensor) -> torch.Tensor:
            return scale_OB.clamp_min(smallest).to(dtype).float()

        levels_K = torch.arange(-half, half).float()
        # The library's own scale puts the largest weight between the two largest codes.
        return Grid(levels_K, self.group_size or 0, reach=half - 0.5, stored=stored)

    def fault(self, outputs: int, inputs: int) -> str | None:
        if inputs % WORD:
            return f"its {inputs} inputs are no multiple of {WORD}, which fill whole words"
        if self.group_size and inputs % self.group_size:
            fitting = ", ".join(str(size) for size in (32, 64, 128) if inputs % size == 0)
            return (
                f"its {inputs} inputs are no multiple of block_size {self.group_size}; "
                f"{fitting} would do, or null for one scale a row"
            )
        return None

    def shapes(self, outputs: int, inputs: int, dtype: torch.dtype) -> Stored:
        words, groups = inputs * self.bits // WORD, inputs // (self.group_size or inputs)
        return {
            "weight_packed": torch.empty(outputs, words, dtype=torch.int32, device="meta"),
            "weight_scale": torch.empty(outputs, groups, dtype=dtype, device="meta"),
            "weight_shape": torch.empty(2, dtype=torch.int64, device="meta"),
        }

    def pack(self, codes: Codes, dtype: torch.dtype) -> Stored:
        half = 2 ** (self.bits - 1)
        signed_OI = (codes.codes_OI.to(torch.int16) - half).to(torch.int8)
        pack = _library().compressors.pack_quantized.pack_to_int32
        return {
            "weight_packed": pack(signed_OI, self.bits),
            "weight_scale": self.grid(dtype).stored(codes.scale_OB).to(dtype),
            "weight_shape": torch.tensor(signed_OI.shape),
        }

    def nearest(self, weight_OI: torch.Tensor) -> Stored:
        groups_OBC = weight_OI.unflatten(1, (-1, self.group_size or weight_OI.shape[1]))
        scheme = self._scheme(["Linear"])
        # What llm-compressor's observer of extremes does; in the weight's dtype, as there.
        scale_OB, _ = _library().quantization.utils.calculate_qparams(
            groups_OBC.amin(2), groups_OBC.amax(2), scheme.weights
        )
        return self._compressor().compress({"weight": weight_OI, "weight_scale": scale_OB}, scheme)

    @property
    def parts(self) -> tuple[str, ...]:
        return "weight_packed", "weight_scale", "weight_shape"

    def unpack(self, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
        # Bits and group size are plain from the tensors; groups of a checkpoint may differ.
        inputs, groups = int(stored["weight_shape"][1]), stored["weight_scale"].shape[1]
        bits = stored["weight_packed"].shape[1] * WORD // inputs
        scheme = Packed(bits, inputs // groups)._scheme(["Linear"])
        return self._compressor().decompress(stored, scheme)["weight"].to(dtype)

    def at_bits(self, bits: int) -> Packed:
        if bits not in BITS:
            raise RecipeError(f"bits: {bits} bits a weight are none of {', '.join(map(str, BITS))}")
        return replace(self, bits=bits)

    def configuration(self, kept: list[str], layers: Mapping[str, Layout]) -> dict[str, Any]:
        names: dict[Packed, list[str]] = {}
        for name, layout in layers.items():
            if isinstance(layout, Packed):
                names.setdefault(layout, []).append(name)
        if len(names) == 1:
            names = {layout: ["Linear"] for layout in names}
        groups = [layout._group(targets) for layout, targets in names.items()]
        return {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
            "ignore": kept,
        }

    def _group(self, targets: list[str]) -> dict[str, Any]:
        return {
            "targets": targets,
            "weights": {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if self.group_size else "channel",
                "group_size": self.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }

    def _scheme(self, targets: list[str]) -> Any:
        return _library().quantization.QuantizationScheme.model_validate(self._group(targets))

    @staticmethod
    def _compressor() -> Any:
        return _library().compressors.BaseCompressor.get_value_from_registry(FORMAT)


def read(configuration: dict[str, Any]) -> Packed | None:
    """The layout of a checkpoint with this `quantization_config`, if it is one of these."""
    if configuration.get("quant_method") != "compressed-tensors":
        return None
    groups = list((configuration.get("config_groups") or {}).values())
    if not groups or not all(_is_ours(group, configuration.get("format")) for group in groups):
        return None
    weights = groups[0]["weights"]
    return Packed(weights["num_bits"], weights.get("group_size"))


def _is_ours(group: dict[str, Any], overall: str | None) -> bool:
    weights = group.get("weights") or {}
    return (
        (group.get("format") or overall) == FORMAT
        and weights.get("type") == "int"
        and weights.get("strategy") in ("group", "channel")
        and weights.get("actorder") != "group"  # whose columns are permuted
        and weights.get("symmetric", True)
        and group.get("input_activations") is None
    )
