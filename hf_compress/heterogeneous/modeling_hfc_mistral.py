"""Mistral whose decoder layers differ in width; needs transformers and modeling_hfc_layers.py."""

from huggingface_hub.dataclasses import strict
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
)

from .modeling_hfc_layers import HFCConfig, HFCForCausalLM, HFCModel


@strict
class HFCMistralConfig(HFCConfig, MistralConfig):
    model_type = "hfc_mistral"


class HFCMistralModel(HFCModel, MistralModel):
    config_class = HFCMistralConfig
    layer_class = MistralDecoderLayer


class HFCMistralForCausalLM(HFCForCausalLM, MistralForCausalLM):
    config_class = HFCMistralConfig
    model_class = HFCMistralModel


HFCMistralConfig.register_for_auto_class()
HFCMistralModel.register_for_auto_class()
HFCMistralForCausalLM.register_for_auto_class("AutoModelForCausalLM")
