"""Phi-3 whose decoder layers differ in width; needs transformers and modeling_hfc_layers.py."""

from huggingface_hub.dataclasses import strict
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import (
    Phi3DecoderLayer,
    Phi3ForCausalLM,
    Phi3Model,
)

from .modeling_hfc_layers import HFCConfig, HFCForCausalLM, HFCModel


@strict
class HFCPhi3Config(HFCConfig, Phi3Config):
    model_type = "hfc_phi3"


class HFCPhi3Model(HFCModel, Phi3Model):
    config_class = HFCPhi3Config
    layer_class = Phi3DecoderLayer


class HFCPhi3ForCausalLM(HFCForCausalLM, Phi3ForCausalLM):
    config_class = HFCPhi3Config
    model_class = HFCPhi3Model


HFCPhi3Config.register_for_auto_class()
HFCPhi3Model.register_for_auto_class()
HFCPhi3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
