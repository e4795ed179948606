"""Tiny random models, tokenizers and shards that the tests share. Everything is made in a folder."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "red green blue what color is the shape circle square yes no a photo of two cats user system"


def tokenizer(folder: Path, chat: bool = True, bos: bool = False) -> Any:
    """A byte-level BPE tokenizer of about 300 entries, saved in the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials, initial_alphabet=alphabet)
    raw.train_from_iterator([WORDS] * 3, trainer)
    if bos:
        begin = ("<s>", raw.token_to_id("<s>"))
        raw.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [begin])
    end = "<|im_end|>" if chat else "</s>"
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token=end, bos_token="<s>" if bos else None
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    made.save_pretrained(folder)
    return made


def llama(folder: Path, layers: int = 2, width: int = 32, chat: bool = True, **more: Any) -> Path:
    """A random Llama with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tokenizer(folder, chat)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=made.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.2,
        **more,
    )
    seeded(LlamaForCausalLM, config).save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    """A random T5 with a tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    made = tokenizer(folder, chat=False)
    config = T5Config(
        vocab_size=len(made),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        eos_token_id=made.eos_token_id,
        pad_token_id=0,
        decoder_start_token_id=0,
        initializer_factor=1.0,
        dropout_rate=0.0,  # T5's own is 0.1, and would hide whether two runs are the same
    )
    seeded(T5ForConditionalGeneration, config).save_pretrained(folder)
    return folder


def vit(folder: Path, size: int = 16, patch: int = 8, width: int = 32, layers: int = 2) -> Path:
    """A random ViT of (size / patch)^2 patches."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=size,
        patch_size=patch,
        initializer_range=0.2,
    )
    seeded(ViTModel, config).save_pretrained(folder)
    return folder


def seeded(kind: Any, config: Any, seed: int = 0) -> Any:
    """A model with random weights that are the same every time."""
    import torch

    torch.manual_seed(seed)
    return kind(config).eval()


def image(seed: int, width: int = 24, height: int = 20, kind: str = "PNG") -> bytes:
    """A picture of noise around one colour."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 60, (height, width, 3)) + generator.integers(0, 196, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def shard(path: Path, samples: Sequence[tuple[str, dict[str, bytes]]]) -> Path:
    """A tar of (key, {extension: bytes})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def questions_shard(path: Path, count: int = 24, images: int = 1, questions: int = 2, first: int = 0) -> Path:
    """Samples of `images` pictures with questions of two kinds; 0 images give text only."""
    colors = ["red", "green", "blue"]
    samples = []
    for number in range(first, first + count):
        color = colors[number % 3]
        asked = [
            {"question": "what color is the shape?", "answer": color, "kind": "color"},
            {"question": "is the shape red?", "answer": "yes" if color == "red" else "no", "kind": "yes_no"},
            {"question": "what shape is it?", "answer": "circle", "kind": "shape"},
        ][:questions]
        members = {"json": json.dumps({"questions": asked}).encode()}
        if images == 1:
            members["png"] = image(number)
        else:
            members |= {f"{i}.png": image(number * 10 + i) for i in range(images)}
        samples.append((f"s{number:04d}", members))
    return shard(path, samples)


def run_tree(folder: Path, output: str = "out", **changes: Any) -> dict[str, Any]:
    """A complete tiny run: ViT, MLP and Llama on `folder/train.tar`, as plain values.

    Args:
        changes: dotted keys with `__` for the dots, `train__max_steps=3`.
    """
    if not (folder / "llama").exists():
        llama(folder / "llama")
        vit(folder / "vit")
        questions_shard(folder / "train.tar")
        questions_shard(folder / "test.tar", 8, first=100)
    tree: dict[str, Any] = {
        "output_dir": str(folder / output),
        "model": {
            "vision": {"model": str(folder / "vit")},
            "connector": {"name": "mlp"},
            "language": {"model": str(folder / "llama")},
        },
        "adapt": [
            {"method": "full", "where": "connector", "learning_rate": 2e-3},
            {"method": "lora", "where": "language", "r": 4, "learning_rate": 1e-3},
        ],
        "data": {"train": [{"shards": str(folder / "train.tar")}], "evaluate": [], "lanes": 4},
        "train": {"max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "deepspeed": "zero0"},
        "evaluate": {"max_new_tokens": 4},
    }
    for key, value in changes.items():
        node = tree
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return tree


def run_of(parts: Path, output: Path, **changes: Any) -> Any:
    """Four steps with a checkpoint each."""
    from vlm_adapt.config.load import validate

    return validate(run_tree(parts, str(output), **({"train__save_steps": 1} | changes)), "x")


def sentence(caught: Any) -> str:
    """The message, which is one line."""
    text = str(caught.value)
    assert "\n" not in text
    return text
