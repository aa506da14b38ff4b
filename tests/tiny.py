"""Tiny random models of every family, and a tokenizer, made from configurations."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_compress.model.families import FAMILIES, family_of

VOCAB = 160
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VARIANTS = {
    "llama": {},
    "llama-tied-biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gpt2": {},
    "opt": {},
    "opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "gpt_neox-sequential": {"use_parallel_residual": False, "attention_bias": False},
    "bert": {},
    "bert-untied": {"tie_word_embeddings": False},
    "gemma3_text": {"sliding_window": 16, "sliding_window_pattern": 2},
    "phi3": {},
    "mixtral": {"num_local_experts": 6},
    "qwen3_moe": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
    },
    "qwen3_moe-dense-first": {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 96,
        "intermediate_size": 80,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 40,
    },
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
CUTS_HEADS = [variant for variant in VARIANTS if FAMILIES[variant.split("-")[0]].cuts_heads]

OWN_NAMES = {
    "gpt2": {"intermediate_size": "n_inner"},
    "opt": {"intermediate_size": "ffn_dim", "initializer_range": "init_std"},
}
"""What a family's configuration calls a field of `COMMON`."""

MIXTURES = [name for name in VARIANTS if FAMILIES[name.split("-")[0]].experts]
WITHOUT_EXPERTS = [name for name in VARIANTS if name not in MIXTURES]


WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
WIDE |= {"num_key_value_heads": 4}
"""A shape whose rows fill whole blocks of weights that share a scale."""


def tiny_model(variant: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random float32 language model; norms and biases are random too, so that all matters."""
    torch.manual_seed(seed)
    model_type = variant.split("-")[0]
    own = OWN_NAMES.get(model_type, {})
    common = {own.get(name, name): value for name, value in COMMON.items()}
    if not FAMILIES[model_type].cuts_heads:
        del common["num_key_value_heads"], common["head_dim"]
    config = AutoConfig.for_model(model_type, **{**common, **VARIANTS[variant], **changes})
    model = family_of(config).auto_class.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name and "lm_head" not in name:
                parameter.mul_(0.3)
    return model


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Words `w0`, `w1`, ... after four special tokens; `special` names more among the words."""
    vocabulary = {name: index for index, name in enumerate(("<pad>", "<s>", "</s>", "<unk>"))}
    vocabulary |= {f"w{index}": index + 4 for index in range(VOCAB - 4)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        **special,
    )


def tiny_text(words: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(
        f"w{index}" for index in torch.randint(VOCAB - 4, (words,), generator=generator).tolist()
    )


def random_ids(windows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (windows, length), generator=generator)
