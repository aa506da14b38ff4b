"""Llama whose decoder layers differ in width; needs transformers and modeling_hfc_layers.py."""

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)

from .modeling_hfc_layers import HFCConfig, HFCForCausalLM, HFCModel


@strict
class HFCLlamaConfig(HFCConfig, LlamaConfig):
    model_type = "hfc_llama"


class HFCLlamaModel(HFCModel, LlamaModel):
    config_class = HFCLlamaConfig
    layer_class = LlamaDecoderLayer


class HFCLlamaForCausalLM(HFCForCausalLM, LlamaForCausalLM):
    config_class = HFCLlamaConfig
    model_class = HFCLlamaModel


HFCLlamaConfig.register_for_auto_class()
HFCLlamaModel.register_for_auto_class()
HFCLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
