"""What scripts/bench/adaptation.py compares: a name, and the lines of its plan beside the connector's.

SmolLM2-135M has 30 blocks of width 576 with 3 key heads of 64; TinyViT-5M 10 blocks of attention. On the
language side the budget is LoRA's of rank 8 on q, k, v and o, 921,600 weights, where a method lets one
choose; others have what their definition gives. Rates: 2e-3 (the run's), less where whole weights train,
more for prompts, which learn slowly.
"""

from __future__ import annotations

from typing import Any

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def language(method: str, **settings: Any) -> list[dict[str, Any]]:
    """One line on the language side."""
    return [{"method": method, "where": "language", **settings}]


def vision(method: str, **settings: Any) -> list[dict[str, Any]]:
    """One line on the vision side."""
    return [{"method": method, "where": "vision", **settings}]


PLANS: dict[str, list[dict[str, Any]]] = {
    "connector_only": [],
    # language: everything, or some of what is there
    "full": language("full", learning_rate=1e-4),
    "last_blocks": language("last_blocks", k=2, learning_rate=3e-4),
    "norm_tuning": language("norm_tuning"),
    "piggyback": language("piggyback", target_modules=ATTENTION),
    # language: low-rank and its relatives
    "lora": language("lora", r=8, target_modules=ATTENTION),
    "lora_all": language("lora", r=3, target_modules="all-linear"),
    "dora": language("lora", r=8, target_modules=ATTENTION, use_dora=True),
    "pissa": language("lora", r=8, target_modules=ATTENTION, init_lora_weights="pissa", learning_rate=1e-3),
    "qkv_lora": language("qkv_lora", r=16, projections=["q", "v"]),
    "binary_lora": language("binary_lora", r=8, target_modules=ATTENTION),
    "adalora": language("adalora", init_r=12, target_r=8, target_modules=ATTENTION),
    "ia3": language("ia3", target_modules=["k_proj", "v_proj", "down_proj"]),
    "loha": language("loha", r=4, target_modules=ATTENTION),
    "lokr": language("lokr", r=16, target_modules=ATTENTION),
    "oft": language("oft", oft_block_size=32, target_modules=ATTENTION),
    "vera": language("vera", r=256, target_modules=ATTENTION, learning_rate=1e-2),
    "pela": language("pela", ratio=3, learning_rate=3e-4),
    # language: adapters
    "houlsby": language("houlsby", bottleneck=13),
    "pfeiffer": language("pfeiffer", bottleneck=26),
    "parallel_adapter": language("parallel_adapter", bottleneck=26),
    "adaptformer": language("adaptformer", bottleneck=26),
    "compacter": language("compacter"),
    "compacter_pp": language("compacter_pp"),
    "binary_adapter": language("binary_adapter", bottleneck=26),
    # language: prompts
    "prompt_tuning": language("prompt_tuning", num_virtual_tokens=20, learning_rate=2e-2),
    "p_tuning": language("p_tuning", num_virtual_tokens=20, encoder_hidden_size=384),
    "prefix_tuning": language("prefix_tuning", num_virtual_tokens=80, learning_rate=1e-2),
    # language: memory
    "side_tuning": language("side_tuning", r=8),
    "lora_back_razor": [*language("lora", r=8, target_modules=ATTENTION), *language("back_razor")],
    # vision
    "vision_full": vision("full", learning_rate=1e-4),
    "vision_lora": vision("lora", r=8, learning_rate=5e-4),
    "vision_conv_lora": vision("conv_lora", r=4, learning_rate=5e-4),
    "vision_adaptformer": vision("adaptformer", bottleneck=16, learning_rate=5e-4),
    "vision_bitfit": vision("bitfit", learning_rate=5e-4),
    "vision_norm_tuning": vision("norm_tuning", learning_rate=5e-4),
    "vision_batch_norm": vision("batch_norm", learning_rate=5e-4),
    "vision_image_prompt": vision("image_prompt", frame=4, learning_rate=1e-2),
    # both
    "lora_both": [
        *language("lora", r=8, target_modules=ATTENTION),
        *vision("lora", r=8, learning_rate=5e-4),
    ],
}
