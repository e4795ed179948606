"""SAM's parts around transformers' classes: counts, names, equality, sizes, prompts in the image's pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_sam
import torch
from safetensors.torch import save_file

from vlm_adapt.config.models import Promptable as Config
from vlm_adapt.errors import UserError
from vlm_adapt.heads import sam_weights
from vlm_adapt.heads.sam import SamDecoder
from vlm_adapt.heads.sam_neck import SamNeck
from vlm_adapt.models.promptable_build import build
from vlm_adapt.vision import build_tower

SAME = 1e-5  # the same modules on the same numbers; what differs is only in what order places lie in memory


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def decoder() -> SamDecoder:
    torch.manual_seed(0)
    made = SamDecoder(64, 8, **tiny_sam.SMALL).eval()
    for parameter in made.parameters():  # masks of several shapes, not all of one sign
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_counts() -> None:
    with torch.device("meta"):
        decoder, neck = SamDecoder(), SamNeck(320, (64, 64))
    assert count(decoder.mask_decoder) == 4_058_340
    assert count(decoder.prompt_encoder) == 6_220  # the matrix of positions is no parameter, as in SAM
    assert count(neck) == 320 * 256 + 256 * 256 * 9 + 4 * 256


PROMPTS = {
    "points": ("points_NPK2", "labels_NPK"),
    "boxes": ("boxes_NP4",),
    "both": ("points_NPK2", "labels_NPK", "boxes_NP4"),
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("multimask", [True, False])
def test_equals_sam_model(decoder: SamDecoder, kind: str, multimask: bool) -> None:
    torch.manual_seed(1)
    features = torch.randn(2, 32, 8, 8)
    given = {
        "points_NPK2": torch.rand(2, 3, 2, 2) * 64,
        "labels_NPK": torch.tensor([[[1, 0], [1, 1], [0, -1]], [[1, -10], [0, 1], [1, 1]]]),
        "boxes_NP4": torch.rand(2, 3, 4) * 64,
    }
    names = {"points_NPK2": "input_points", "labels_NPK": "input_labels", "boxes_NP4": "input_boxes"}
    ours = {name: given[name] for name in PROMPTS[kind]}
    sam = tiny_sam.sam_model(decoder)
    with torch.no_grad():
        logits, iou = decoder(features, **ours, multimask=multimask)
        theirs = sam(
            image_embeddings=features,
            multimask_output=multimask,
            **{names[name]: value for name, value in ours.items()},
        )
    assert logits.shape == (2, 3, 3 if multimask else 1, 32, 32)
    assert theirs.pred_masks.std() > 0.1
    torch.testing.assert_close(logits, theirs.pred_masks, rtol=SAME, atol=SAME)
    torch.testing.assert_close(iou, theirs.iou_scores, rtol=SAME, atol=SAME)


def test_a_mask_prompt_each(decoder: SamDecoder) -> None:
    """transformers adds one mask an image; several prompts with a mask each equal several calls."""
    torch.manual_seed(1)
    features, masks = torch.randn(1, 32, 8, 8), torch.randn(1, 2, 32, 32)
    points, labels = torch.rand(1, 2, 1, 2) * 64, torch.ones(1, 2, 1)
    sam = tiny_sam.sam_model(decoder)
    with torch.no_grad():
        logits, iou = decoder(features, points, labels, masks_NPHW=masks)
        alone, _ = decoder(features, masks_NPHW=masks)
        mixed, _ = decoder(
            features, points, labels, masks_NPHW=masks, masked_NP=torch.tensor([[True, False]])
        )
        plain, _ = decoder(features, points, labels)
        for number in range(2):
            one = slice(number, number + 1)
            theirs = sam(
                image_embeddings=features,
                input_points=points[:, one],
                input_labels=labels[:, one],
                input_masks=masks[:, one],
            )
            torch.testing.assert_close(logits[:, one], theirs.pred_masks, rtol=SAME, atol=SAME)
            torch.testing.assert_close(iou[:, one], theirs.iou_scores, rtol=SAME, atol=SAME)
            only = sam(image_embeddings=features, input_masks=masks[:, one])
            torch.testing.assert_close(alone[:, one], only.pred_masks, rtol=SAME, atol=SAME)
    torch.testing.assert_close(mixed[:, 0], logits[:, 0], rtol=SAME, atol=SAME)
    torch.testing.assert_close(mixed[:, 1], plain[:, 1], rtol=SAME, atol=SAME)


def test_names_of_sams_checkpoints(decoder: SamDecoder, tmp_path: Path) -> None:
    neck = SamNeck(24, (8, 8), 32)
    file = tmp_path / "sam_decoder.safetensors"
    state = tiny_sam.in_sams_names(decoder, neck)
    encoder = {"image_encoder.blocks.0.norm1.weight": torch.zeros(3)}
    save_file(state | encoder, file)
    tensors, settings = sam_weights.read(tmp_path)
    assert settings == {} and len(tensors) == len(state)
    other, other_neck = SamDecoder(64, 8, **tiny_sam.SMALL), SamNeck(24, (8, 8), 32)
    own = {name: value for name, value in tensors.items() if not name.startswith("neck.")}
    sam_weights.load(other, own, "", str(file))
    sam_weights.load(other_neck.layers, tensors, "neck.", str(file))
    for one, two in ((decoder, other), (neck, other_neck)):
        for name, value in one.state_dict().items():
            torch.testing.assert_close(two.state_dict()[name], value, rtol=0, atol=0)
    del own["mask_decoder.iou_token.weight"]
    with pytest.raises(UserError, match=r"1 missing \(mask_decoder.iou_token.weight\)"):
        sam_weights.load(other, own, "", str(file))
    with pytest.raises(UserError, match="32, 32, 3, 3.* where .24"):
        sam_weights.load(SamNeck(24, (8, 8), 24).layers, tensors, "neck.", str(file))
    save_file(encoder, tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match="holds no mask decoder of SAM"):
        sam_weights.read(tmp_path / "encoder.safetensors")


def test_folder_of_sam_model(decoder: SamDecoder, tmp_path: Path) -> None:
    """A folder of transformers brings its sizes along; the neck fits towers of its image encoder's width."""
    sam = tiny_sam.sam_model(decoder)
    sam.save_pretrained(tmp_path / "sam")
    tower = tiny_sam.config(tmp_path).model_copy(
        update={
            "decoder": tiny_sam.config(tmp_path).decoder.model_validate(
                {"weights": f"file:{tmp_path / 'sam'}", "neck": "random"}
            )
        }
    )
    made = build(tower, torch.float32).model.connector.decoder
    for name, value in decoder.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value, rtol=0, atol=0)
    wrong = tower.model_copy(update={"decoder": tower.decoder.model_copy(update={"neck": "given"})})
    with pytest.raises(UserError, match="neck: random"):  # 16 channels there, 32 here
        build(wrong, torch.float32)


@pytest.mark.parametrize("size", [None, 96])
def test_sam_model_whole(decoder: SamDecoder, tmp_path: Path, size: int | None) -> None:
    """SAM's own image encoder as the tower, neck and decoder from the same folder: masks of SamModel."""
    torch.manual_seed(0)
    side = 64 if size is None else size
    sam = tiny_sam.sam_model(decoder, num_hidden_layers=2, window_size=3)
    for parameter in sam.vision_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    sam.save_pretrained(tmp_path / "sam")
    folder = str(tmp_path / "sam")
    config = Config.model_validate(
        {
            "kind": "promptable",
            "vision": {"model": folder, "image_size": size},
            "decoder": {"weights": f"file:{folder}"},
        }
    )
    model = build(config, torch.float32).model
    assert model.vision.grids([0, 1]) == [(side // 8, side // 8)] * 2 and model.vision.widths() == [16]
    assert any("neck" not in note and "mask_decoder" in note for note in model.vision.notes)
    pixels, points = torch.randn(1, 3, side, side), torch.tensor([[[[20.0, 30]]]])
    with torch.no_grad():
        features = model.connector.neck(model.vision(pixels)[0])
        logits, iou = model.connector.decoder(features, points, torch.ones(1, 1, 1))
        if size is None:
            wanted = sam(pixels, input_points=points, input_labels=torch.ones(1, 1, 1))
            torch.testing.assert_close(logits, wanted.pred_masks, rtol=SAME, atol=SAME)
            torch.testing.assert_close(iou, wanted.iou_scores, rtol=SAME, atol=SAME)
    assert logits.shape == (1, 1, 3, side // 2, side // 2) and logits.std() > 0.1


def test_every_weight_gets_a_gradient(decoder: SamDecoder) -> None:
    features, boxes = torch.randn(1, 32, 8, 8), torch.rand(1, 2, 4) * 64
    logits, iou = decoder(features, boxes_NP4=boxes)
    with torch.no_grad():
        same, _ = decoder(features, boxes_NP4=boxes)
    torch.testing.assert_close(logits, same, rtol=0, atol=0)  # what gives the gradients adds nothing
    (logits.mean() + iou.mean()).backward()
    assert not [name for name, one in decoder.named_parameters() if one.grad is None]


def test_positions_stay_exact(decoder: SamDecoder) -> None:
    exact = decoder.image_positions()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(decoder.image_positions(), exact, rtol=0, atol=0)
    decoder.to(torch.bfloat16)
    torch.testing.assert_close(decoder.image_positions(), exact, rtol=0, atol=0)


def test_last_stride() -> None:
    """At any size the last map is as fine as the one before, at the last stage's width; the weights stay."""
    for size, grid in ((64, 4), (96, 6)):  # 1024 is in test_sam_package.py
        plain = build_tower("timm:tiny_vit_5m_224", "random:0", size)
        fine = build_tower("timm:tiny_vit_5m_224", "random:0", size, options={"last_stride": 1})
        assert plain.grids([-2, -1]) == [(grid, grid), (grid // 2, grid // 2)]
        assert fine.grids([-2, -1]) == [(grid, grid), (grid, grid)]
        assert fine.widths([-2, -1]) == plain.widths([-2, -1]) == [160, 320]
        assert fine(torch.zeros(1, 3, size, size))[0].shape == (1, grid**2, 320)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(fine.state_dict()[name], value, rtol=0, atol=0)
    with pytest.raises(UserError, match="1 or 2, not 3"):
        build_tower("timm:tiny_vit_5m_224", "random:0", 64, options={"last_stride": 3})
    with pytest.raises(UserError, match="for TinyViT only"):
        build_tower("timm:vit_tiny_patch16_224", "random:0", 64, options={"last_stride": 1})
