"""Tiny random causal language models of many families, by name, with a window where they have one."""

from __future__ import annotations

from typing import Any

import tiny

VOCABULARY = 97
WINDOW = 4

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_GROUPS = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", BASE),
    "mistral": ("Mistral", BASE | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", BASE),
    "qwen2_sliding": ("Qwen2", BASE | MIXED | {"use_sliding_window": True}),
    "qwen3": ("Qwen3", BASE | {"head_dim": 8}),
    "gemma": ("Gemma", BASE | {"head_dim": 8}),
    "gemma2": ("Gemma2", BASE | MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", BASE | MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi": ("Phi", BASE),
    "phi3": ("Phi3", BASE | {"sliding_window": WINDOW, "original_max_position_embeddings": 64}),
    "granite": (
        "Granite",
        BASE
        | {
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "hyperclovax": ("HyperCLOVAX", BASE | {"logits_scaling": 3.0}),
    "cohere": ("Cohere", BASE | {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", BASE | MIXED | {"logit_scale": 0.25, "head_dim": 8}),
    "smollm3": ("SmolLM3", BASE | {"no_rope_layers": [1, 0]}),
    "olmo2": ("Olmo2", BASE),
    "stablelm": ("StableLm", BASE),
    "starcoder2": ("Starcoder2", BASE | {"sliding_window": WINDOW}),
    "gpt_neox": ("GPTNeoX", NO_GROUPS | {"rotary_pct": 0.5}),
    "gpt2": ("GPT2", GPT2),
    "opt": ("OPT", OPT),
    "opt_projected": ("OPT", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
}
SLIDING = ["mistral", "qwen2_sliding", "gemma2", "gemma3", "phi3", "cohere2", "starcoder2"]


def model(family: str, seed: int = 0) -> Any:
    """A random causal model of a family, in evaluation mode."""
    import transformers

    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**settings)
    return tiny.seeded(transformers.AutoModelForCausalLM.from_config, config, seed)
