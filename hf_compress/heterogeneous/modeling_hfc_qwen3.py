"""Qwen3 whose decoder layers differ in width; needs transformers and modeling_hfc_layers.py."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from .modeling_hfc_layers import HFCConfig, HFCForCausalLM, HFCModel


@strict
class HFCQwen3Config(HFCConfig, Qwen3Config):
    model_type = "hfc_qwen3"


class HFCQwen3Model(HFCModel, Qwen3Model):
    config_class = HFCQwen3Config
    layer_class = Qwen3DecoderLayer


class HFCQwen3ForCausalLM(HFCForCausalLM, Qwen3ForCausalLM):
    config_class = HFCQwen3Config
    model_class = HFCQwen3Model


HFCQwen3Config.register_for_auto_class()
HFCQwen3Model.register_for_auto_class()
HFCQwen3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
