"""Adaptation methods and the plan that applies them. A new method is one file and one line here."""

from vlm_adapt.choices import Choices

METHODS = Choices(
    "adaptation method",
    {
        "full": "vlm_adapt.adapt.full:Full",
        "last_blocks": "vlm_adapt.adapt.full:LastBlocks",
        "piggyback": "vlm_adapt.adapt.piggyback:Piggyback",
        "bitfit": "vlm_adapt.adapt.selective:BitFit",
        "norm_tuning": "vlm_adapt.adapt.selective:NormTuning",
        "batch_norm": "vlm_adapt.adapt.selective:BatchNorm",
        "lora": "vlm_adapt.adapt.lora:Lora",
        "binary_lora": "vlm_adapt.adapt.binary_lora:BinaryLora",
        "conv_lora": "vlm_adapt.adapt.conv_lora:ConvLora",
        "qkv_lora": "vlm_adapt.adapt.qkv_lora:QkvLora",
        "pela": "vlm_adapt.adapt.pela:Pela",
        "houlsby": "vlm_adapt.adapt.bottleneck:Houlsby",
        "pfeiffer": "vlm_adapt.adapt.bottleneck:Pfeiffer",
        "parallel_adapter": "vlm_adapt.adapt.bottleneck:ParallelAdapter",
        "adaptformer": "vlm_adapt.adapt.bottleneck:AdaptFormer",
        "compacter": "vlm_adapt.adapt.compacter:Compacter",
        "compacter_pp": "vlm_adapt.adapt.compacter:CompacterPlusPlus",
        "binary_adapter": "vlm_adapt.adapt.binary_adapter:BinaryAdapter",
        "learned_queries": "vlm_adapt.adapt.learned_queries:LearnedQueries",
        "prompt_tuning": "vlm_adapt.adapt.prompt_tuning:PromptTuning",
        "p_tuning": "vlm_adapt.adapt.p_tuning:PTuning",
        "prefix_tuning": "vlm_adapt.adapt.prefix_tuning:PrefixTuning",
        "image_prompt": "vlm_adapt.adapt.image_prompt:ImagePrompt",
        "visual_prompt": "vlm_adapt.adapt.visual_prompt:VisualPrompt",
        "visual_prompt_windows": "vlm_adapt.adapt.visual_prompt_windows:VisualPromptWindows",
        "side_tuning": "vlm_adapt.adapt.side_tuning:SideTuning",
        "back_razor": "vlm_adapt.adapt.back_razor:BackRazor",
    },
)
