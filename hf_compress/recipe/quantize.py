"""What a recipe says of the stage that stores weights in few bits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hf_compress.recipe.strict import Strict


class Quantize(Strict):
    """Linear layers of the decoder blocks in 3, 4 or 8 bits, in a format that stock libraries load.
    Embeddings and the head keep their dtype."""

    stage: Literal["quantize"] = "quantize"
    format: str = "nf4"
    """One of `hf_compress.formats.FORMATS`: nf4, fp4 and int8 are bitsandbytes' own; W3A16, W4A16
    and W8A16 (3, 4 and 8 bits) compressed-tensors', which vLLM reads."""
    block_size: int | None = Field(64, ge=1)
    """Consecutive weights of a row that share a scale; null for one scale a row, which int8 has
    anyway, and nf4 and fp4 cannot have. vLLM's kernels take 32, 64, 128 and null."""
    bits: dict[str, int] = Field({})
    """Bits of layers that are to have others than `format` says, by patterns as in `ignore`:
    {"*.down_proj": 8}. With W3A16, W4A16 and W8A16; bitsandbytes cannot mix."""
    double_quant: bool = False
    """With nf4 and fp4: the scales are stored in 8 bits, which saves 0.4 bits a weight."""
    calibrated: bool = True
    """Choose codes on the calibration text, so that rounding errors make up for each other;
    otherwise round to nearest, as the format's own library does."""
    effort: Literal["fast", "best"] = "fast"
    """`fast`: codes in closed form. `best`: from there on, codes, scales, biases and norms of
    every decoder block learn by gradient descent on its own output error. Measured so far it is
    no better than `fast` (SmolLM2-135M, NF4, 16k tokens, 16 windows: .051 nats over dense against
    .048), at three times the time."""
    epochs: int = Field(1, ge=1)
    """With `best`: times that each block sees the calibration text."""
    learning_rate: float = Field(1e-3, gt=0)
    """With `best`: largest step of Adam, as a share of a tensor's root mean square."""
    batch_size: int = Field(1, ge=1)
    """With `best`: windows in a step."""
    correction: float = Field(0.5, ge=0, le=1)
    """How far each layer also makes up for what rounding did before it to its inputs and to the
    residual stream: 0 aims at what the layer would give on the inputs that it now gets, 1 at
    what it gave in the model as it was found."""
    ignore: list[str] = Field([])
    """Linear layers that keep their dtype, by globs or `re:` patterns over their names in the
    model, such as `*.down_proj` or `model.layers.0.*`."""

    @model_validator(mode="after")
    def _consistent(self) -> Quantize:
        in_blocks = self.format in ("nf4", "fp4")
        if self.double_quant and not in_blocks:
            raise ValueError(f"double_quant goes with nf4 and fp4, not with {self.format}")
        if self.effort == "best" and not self.calibrated:
            raise ValueError("effort best learns from text; take out calibrated: false")
        if self.block_size is None and in_blocks:
            raise ValueError(f"{self.format} needs a block_size, such as 64; null will not do")
        return self

    @property
    def corrects(self) -> bool:
        """Whether the model as it was found runs beside."""
        return self.calibrated and (self.correction > 0 or self.effort == "best")
