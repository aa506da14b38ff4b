"""Gemma 3 whose decoder layers differ in width; needs transformers and modeling_hfc_layers.py."""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3DecoderLayer,
    Gemma3ForCausalLM,
    Gemma3TextModel,
)

from .modeling_hfc_layers import HFCConfig, HFCForCausalLM, HFCModel, Norms

NORMS: Norms = {
    "attention": ("input_layernorm", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


@strict
class HFCGemma3TextConfig(HFCConfig, Gemma3TextConfig):
    model_type = "hfc_gemma3_text"


class HFCGemma3TextModel(HFCModel, Gemma3TextModel):
    config_class = HFCGemma3TextConfig
    layer_class = Gemma3DecoderLayer
    norms = NORMS


class HFCGemma3TextForCausalLM(HFCForCausalLM, Gemma3ForCausalLM):
    config_class = HFCGemma3TextConfig
    model_class = HFCGemma3TextModel


HFCGemma3TextConfig.register_for_auto_class()
HFCGemma3TextModel.register_for_auto_class()
HFCGemma3TextForCausalLM.register_for_auto_class("AutoModelForCausalLM")
