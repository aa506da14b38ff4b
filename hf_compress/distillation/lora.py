"""Low-rank adapters on a student (Hu et al. 2021), as PEFT makes them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_compress.errors import RecipeError


def with_adapters(student: PreTrainedModel, rank: int) -> Any:
    """The student with trainable adapters on every linear layer but the head, all else frozen.

    On a base in 4 or 8 bits this is QLoRA (Dettmers et al. 2023).

    Raises:
        RecipeError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError(
            "method: lora needs peft: pip install 'hf-compress[peft]', or use method: full"
        ) from error
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(student, config)
