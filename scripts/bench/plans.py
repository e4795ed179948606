"""What scripts/bench/adaptation.py compares: a name, and the lines of its plan beside the connector's.

SmolLM2-135M has 30 blocks of width 576 with 3 key heads of 64; TinyViT-5M 10 blocks of attention. On the
language side the budget is LoRA's of rank 8 on q, k, v and o, 921,600 weights, where a method lets one
choose; others have what their definition gives. Rates: 2e-3 (the run's), less where whole weights train or
one number moves much of a layer, more for prompts, scales and spectra, which learn slowly.
"""

from __future__ import annotations

from typing import Any

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Ids in SmolLM2's vocabulary: of what stands around an answer, and of the first pieces of answers.
MARKS = [1, 2, 198, 520, 9531]
ANSWERS = [272, 455, 676, 2168, 6935, 9298, 13567, 16591, 22128, 22216, 22948, 23429, 29733]

Plans = dict[str, list[dict[str, Any]]]


def language(method: str, **settings: Any) -> list[dict[str, Any]]:
    """One line on the language side."""
    return [{"method": method, "where": "language", **settings}]


def attention(method: str, **settings: Any) -> list[dict[str, Any]]:
    """One line on the language side's query, key, value and output layers."""
    return language(method, target_modules=ATTENTION, **settings)


def vision(method: str, **settings: Any) -> list[dict[str, Any]]:
    """One line on the vision side."""
    return [{"method": method, "where": "vision", **settings}]


# Titles are those of the plot's panels.
FAMILIES: dict[str, Plans] = {
    "some or all of what is there": {
        "connector_only": [],
        "full": language("full", learning_rate=1e-4),
        "last_blocks": language("last_blocks", k=2, learning_rate=3e-4),
        "norm_tuning": language("norm_tuning"),
        "trainable_tokens": language("trainable_tokens", token_indices=[*MARKS, *ANSWERS]),
        "shira": attention("shira", r=8, learning_rate=5e-4),
        "supertuning": attention("supertuning", sparsity=0.9653, learning_rate=5e-4),
        "piggyback": attention("piggyback", learning_rate=3e-4),
        "pela": language("pela", ratio=3, learning_rate=3e-4),
    },
    "low-rank updates": {
        "lora": attention("lora", r=8),
        "lora_all": language("lora", r=3, target_modules="all-linear"),
        "dora": attention("lora", r=8, use_dora=True),
        "pissa": attention("lora", r=8, init_lora_weights="pissa", learning_rate=1e-3),
        "qkv_lora": language("qkv_lora", r=16, projections=["q", "v"]),
        "binary_lora": attention("binary_lora", r=8),
        "adalora": attention("adalora", init_r=12, target_r=8),
        "gralora": attention("gralora", r=8, alpha=16, learning_rate=1e-3),
        "delora": attention("delora", r=8, delora_lambda=1),
        "deft": attention("deft", r=8),
        "hira": attention("hira", r=8, learning_rate=1e-2),
        "glora": attention("glora", r=4),
        "lily": attention("lily", r=12, num_B=4),
        "vera": attention("vera", r=256, learning_rate=1e-2),
        "pvera": attention("pvera", r=256, learning_rate=1e-2),
        "randlora": attention("randlora", r=26),
        "vblora": attention("vblora", r=4, num_vectors=352, vector_length=192, learning_rate=4e-3),
        "unilora": attention("unilora", r=16, theta_d_length=921_600, learning_rate=4e-3),
        "tinylora": attention("tinylora", learning_rate=1e-2),
        "osf": attention(
            "osf", effective_rank=568, rank_pattern={"k_proj": 184, "v_proj": 184}, learning_rate=1e-3
        ),
    },
    "updates of other forms": {
        "ia3": language("ia3", target_modules=["k_proj", "v_proj", "down_proj"]),
        "beft": attention("beft", learning_rate=1e-2),
        "road": attention("road", learning_rate=1e-2),
        "oft": attention("oft", oft_block_size=32),
        "boft": attention("boft", boft_block_size=12),  # peft has one factor without its CUDA extension
        "hra": attention("hra", r=14),
        "psoft": attention("psoft", r=122),
        "loha": attention("loha", r=4),
        "lokr": attention("lokr", r=16),
        "miss": attention("miss", r=20, learning_rate=4e-4),
        "peanut": attention("peanut", r=10, learning_rate=5e-3),
        "frod": attention("frod", sparse_rate=0.0214, progressbar=False),
        "c3a": attention("c3a", block_size=32, init_weights=True, learning_rate=1e-2),
        "fourierft": attention("fourierft", n_frequency=7680, init_weights=True, learning_rate=1e-2),
        "waveft": attention("waveft", n_frequency=7680, learning_rate=2e-4),
    },
    "adapters": {
        "houlsby": language("houlsby", bottleneck=13),
        "pfeiffer": language("pfeiffer", bottleneck=26),
        "parallel_adapter": language("parallel_adapter", bottleneck=26),
        "adaptformer": language("adaptformer", bottleneck=26),
        "compacter": language("compacter"),
        "compacter_pp": language("compacter_pp"),
        "binary_adapter": language("binary_adapter", bottleneck=26),
    },
    "prompts; less memory": {
        "prompt_tuning": language("prompt_tuning", num_virtual_tokens=20, learning_rate=2e-2),
        "p_tuning": language("p_tuning", num_virtual_tokens=20, encoder_hidden_size=384),
        "prefix_tuning": language("prefix_tuning", num_virtual_tokens=80, learning_rate=1e-2),
        "side_tuning": language("side_tuning", r=8),
        "lora_back_razor": [*attention("lora", r=8), *language("back_razor")],
    },
    "the tower": {
        "vision_full": vision("full", learning_rate=1e-4),
        "vision_lora": vision("lora", r=8, learning_rate=5e-4),
        "vision_conv_lora": vision("conv_lora", r=4, learning_rate=5e-4),
        "vision_adaptformer": vision("adaptformer", bottleneck=16, learning_rate=5e-4),
        "vision_bitfit": vision("bitfit", learning_rate=5e-4),
        "vision_norm_tuning": vision("norm_tuning", learning_rate=5e-4),
        "vision_batch_norm": vision("batch_norm", learning_rate=5e-4),
        "vision_image_prompt": vision("image_prompt", frame=4, learning_rate=1e-2),
        "visual_prompt_windows": vision("visual_prompt_windows", learning_rate=1e-2),
        "lora_both": [*attention("lora", r=8), *vision("lora", r=8, learning_rate=5e-4)],
    },
}
PLANS: Plans = {name: lines for family in FAMILIES.values() for name, lines in family.items()}
# Methods that have no place in this comparison, and why.
NOT_HERE = {
    "learned_queries": "is for the connector, which here trains whole beside every method",
    "visual_prompt": "is for plain ViTs, and TinyViT attends in windows: visual_prompt_windows is its like",
}
