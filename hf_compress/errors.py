"""The exceptions that hf_compress raises on purpose; a caller catches `CompressionError`.

Every message says what happened, with the value, why it cannot go on, and the way out.
"""


class CompressionError(Exception):
    """Anything that hf_compress refuses or cannot finish."""


class RecipeError(CompressionError):
    """A recipe, or an argument that would stand in one, asks for something impossible."""


class DataError(CompressionError):
    """Text for calibration or evaluation is missing, too short, or overlaps."""


class ModelError(CompressionError):
    """The model to compress cannot be read, is unknown, or computes non-finite values."""


class PlanError(CompressionError):
    """A plan does not fit its model, or would leave a layer without units."""


class CheckpointError(CompressionError):
    """A checkpoint could not be written, or does not load as what was written."""
