"""Qwen2 whose decoder layers differ in width; needs transformers and modeling_hfc_layers.py."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
)

from .modeling_hfc_layers import HFCConfig, HFCForCausalLM, HFCModel


@strict
class HFCQwen2Config(HFCConfig, Qwen2Config):
    model_type = "hfc_qwen2"


class HFCQwen2Model(HFCModel, Qwen2Model):
    config_class = HFCQwen2Config
    layer_class = Qwen2DecoderLayer


class HFCQwen2ForCausalLM(HFCForCausalLM, Qwen2ForCausalLM):
    config_class = HFCQwen2Config
    model_class = HFCQwen2Model


HFCQwen2Config.register_for_auto_class()
HFCQwen2Model.register_for_auto_class()
HFCQwen2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
