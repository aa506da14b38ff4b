"""What metrics.json says of stages that change weights and not widths."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    # NaN has no place in JSON, and a comparison with it is silently false.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Refitted(Strict):
    """What training every block on its own output error did."""

    kept: bool
    """Whether the result was kept; otherwise the checkpoint is as before."""
    epochs: int = Field(ge=1)
    """Times that each block saw the calibration text."""
    kl_before: float
    """Mean KL(dense || compressed) on the fitness windows before, nats per token."""
    kl_after: float
    """The same after."""


class Distilled(Strict):
    """What training on a teacher's distributions did."""

    kept: bool
    """Whether the result was kept; otherwise the checkpoint is as before."""
    loss: str
    """The divergence that was minimized."""
    cross_entropy: float = Field(ge=0, le=1)
    """Share of the text's own next token in the loss."""
    method: Literal["full", "lora"]
    """Whether all weights were trained, or adapters that were then merged."""
    teacher: str | None = None
    """Name of the teacher; None for the dense model."""
    tokens: int = Field(ge=1)
    """Tokens that were trained on."""
    minutes: float = Field(ge=0)
    """Wall-clock minutes of training, evaluation on held-out windows included."""
    kl_before: float
    """Mean KL(teacher || student) on the fitness windows before, nats per token."""
    kl_after: float
    """The same after."""


class Zeroing(Strict):
    """Single weights that were set to zero."""

    zeros: int = Field(ge=0)
    """Weights of linear layers in the decoder blocks that were zero when the stage ended."""
    weights: int = Field(ge=1)
    """All weights of these layers."""
    pattern: str
    """`unstructured`, or N:M for at most N of M consecutive weights that are not zero."""
    criterion: str
    """How weights were ranked."""
    refit: bool
    """Whether the weights that are left were fitted by least squares."""
    allocation: str
    """How zeros were shared out among the layers."""
    num_calibration_tokens: int = Field(ge=0)
    """Tokens that the statistics were collected on; 0 where none were needed."""


class Quantization(Strict):
    """Linear layers that are stored in few bits."""

    format: str
    library: str
    """What a user has to install beside transformers to load it."""
    block_size: int | None = Field(ge=1)
    """Weights of a row that share a scale; None for a whole row."""
    double_quant: bool
    """Whether the scales are stored in 8 bits."""
    calibrated: bool
    """Whether codes were chosen on text, and not rounded to nearest."""
    effort: str
    weights: int = Field(ge=1)
    """Weights that are stored so."""
    bytes: int = Field(ge=1)
    """What they take with their scales."""
    error: float | None = Field(ge=0)
    """Share of a layer's wanted output that its codes in closed form lose, mean over layers."""
    error_nearest: float | None = Field(ge=0)
    """The same of the weights that were found, rounded to nearest."""
    num_calibration_tokens: int = Field(ge=0)
