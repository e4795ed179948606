"""SAM's parts around transformers' classes: counts, names, equality, sizes, prompts in the image's pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_sam
import torch
from safetensors.torch import save_file

from vlm_adapt.adapt.plan import apply_plan
from vlm_adapt.config.schema import Adapt
from vlm_adapt.data.long_side import Frame, fit_long_side, fit_mask
from vlm_adapt.errors import UserError
from vlm_adapt.heads import sam_weights
from vlm_adapt.heads.sam import SamDecoder
from vlm_adapt.heads.sam_neck import SamNeck
from vlm_adapt.heads.sam_words import WordPrompt
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.models.promptable import Promptable
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


@pytest.fixture
def model(tmp_path: Path) -> Promptable:
    return build(tiny_sam.config(tmp_path), torch.float32).model


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


@pytest.mark.parametrize(
    ("size", "resized"),
    [((48, 64), (48, 64)), ((30, 60), (32, 64)), ((100, 33), (64, 21)), ((1, 900), (1, 64))],
)
def test_square(size: tuple[int, int], resized: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (*size, 3), np.uint8)
    spec = ImageSpec((64, 64), (0.5, 0.25, 0.75))
    square, frame = fit_long_side(pixels, 64, spec)
    assert frame == Frame(size, resized, 64) and square.shape == (3, 64, 64)
    beyond = np.ones((64, 64), bool)
    beyond[: resized[0], : resized[1]] = False
    for channel, value in enumerate((128, 64, 191)):
        assert (square[channel][beyond] == value).all()
    if size == resized:
        assert (square[:, :48] == pixels.transpose(2, 0, 1)).all()
    corner = frame.inward(np.array([[size[1], size[0]]]))
    np.testing.assert_allclose(corner, [[resized[1], resized[0]]])
    mask = np.ones(size, np.uint8)
    assert (fit_mask(mask, frame, fill=7)[~beyond] == 1).all()
    assert (fit_mask(mask, frame, fill=7)[beyond] == 7).all()


def test_the_road_of_sam(model: Promptable) -> None:
    """Points of the image, scaled; beyond the image zeros; logits to the square, cut, and to the image."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 100, 3), np.uint8)
    embedding = model.embed(pixels)
    square, frame = fit_long_side(pixels, 64, model.image_spec)
    normalised = model.vision.normalise(torch.from_numpy(square)[None])
    normalised[:, :, frame.resized[0] :] = 0
    with torch.no_grad():
        features = model.connector.neck(model.vision(normalised)[0])
        torch.testing.assert_close(embedding.features_1Dhw, features, rtol=0, atol=0)
        scaled = torch.tensor([[[[50 * 0.64, 20 * (26 / 40)]]]])
        low, iou = model.connector.decoder(features, scaled, torch.ones(1, 1, 1))
        big = torch.nn.functional.interpolate(low[0], (64, 64), mode="bilinear")[..., :26, :]
        big = torch.nn.functional.interpolate(big, (40, 100), mode="bilinear")
    found = model.masks(embedding, [[[50, 20]]])
    assert found.logits_PMHW.shape == (1, 3, 40, 100)
    torch.testing.assert_close(found.logits_PMHW, big, rtol=SAME, atol=SAME)
    torch.testing.assert_close(found.iou_PM, iou[0], rtol=SAME, atol=SAME)
    again = model.masks(embedding, [[[50, 20]]], mask_inputs_Phw=found.low_PMhw[:, 1], multimask=False)
    assert again.logits_PMHW.shape == (1, 1, 40, 100)
    assert not torch.equal(again.low_PMhw, model.masks(embedding, [[[50, 20]]], multimask=False).low_PMhw)


def test_many_prompts_equal_each_alone(model: Promptable) -> None:
    embedding = model.embed(np.full((30, 30, 3), 90, np.uint8))
    boxes = np.random.default_rng(0).uniform(0, 30, (11, 4)).astype(np.float32)
    together = model.masks(embedding, boxes_P4=boxes)
    for number in (0, 5, 10):
        alone = model.masks(embedding, boxes_P4=boxes[number : number + 1])
        torch.testing.assert_close(together.logits_PMHW[number], alone.logits_PMHW[0], rtol=SAME, atol=SAME)


def test_mask_prompt(model: Promptable) -> None:
    mask = np.zeros((30, 60), bool)
    mask[:, 30:] = True
    frame = Frame.of((30, 60), 64)
    prompt = model.mask_prompt(mask, frame)
    assert prompt.shape == (1, 32, 32)
    assert (prompt[0, :16, 16:] > 0).all() and (prompt[0, :, :16] < 0).all() and (prompt[0, 16:] < 0).all()
    with pytest.raises(UserError, match="the mask is 30 x 30 and the image 60 x 30"):
        model.mask_prompt(mask[:, :30], frame)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "a mask needs a prompt"),
        ({"points_PK2": [[1, 2]]}, r"points are \[prompts, points, 2\]"),
        ({"points_PK2": [[[1, 2]]], "point_labels_PK": [[1, 0]]}, "1 points have 2 labels"),
        ({"points_PK2": [[[1, 2]]], "boxes_P4": [[0, 0, 1, 1]] * 2}, "there are 1 and 2 prompts"),
        ({"boxes_P4": [[0, 0, 1, 1]], "mask_inputs_Phw": torch.zeros(1, 8, 8)}, "of 32 x 32 logits, not 8"),
        ({"words": ["cat"]}, "has no text encoder"),
    ],
)
def test_prompts_that_cannot_be(model: Promptable, given: dict[str, object], said: str) -> None:
    embedding = model.embed(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=said):
        model.masks(embedding, **given)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decoder": {"mlp_dims": 3}}, "did you mean 'mlp_dim'"),
        ({"decoder": {"width": 20}}, "a multiple of 8, not 20"),
        ({"decoder": {"weights": "random:x"}}, "whole number after 'random:'"),
        ({"decoder": {"weights": "hub:"}}, "names nothing"),
        ({"decoder": {"weights": "file:/nowhere"}}, "there is no file"),
    ],
)
def test_decoders_that_cannot_be(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(tiny_sam.config(tmp_path, **settings), torch.float32)


def test_one_layer_and_squares(tmp_path: Path) -> None:
    vision = tiny_sam.config(tmp_path).vision
    several = vision.model_copy(update={"layers": (0, 1)})
    with pytest.raises(UserError, match="reads one layer"):
        build(tiny_sam.config(tmp_path, vision=several), torch.float32)
    wide = vision.model_copy(update={"image_size": (32, 64)})
    with pytest.raises(UserError, match="squares"):
        build(tiny_sam.config(tmp_path, vision=wide), torch.float32)


def test_bf16_leaves_the_decoder_exact(tmp_path: Path) -> None:
    model = build(tiny_sam.config(tmp_path), torch.bfloat16).model
    before = model.connector.neck.layers.conv1.weight.clone()
    model.to(torch.bfloat16)
    torch.testing.assert_close(model.connector.neck.layers.conv1.weight, before, rtol=0, atol=0)
    assert {one.dtype for one in model.vision.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in model.connector.parameters()} == {torch.float32}
    assert model.embed(np.zeros((8, 8, 3), np.uint8)).features_1Dhw.dtype == torch.float32


def test_no_weights_are_held_where_none_are_wanted(tmp_path: Path) -> None:
    model = build(tiny_sam.config(tmp_path), torch.float32, empty=True).model
    assert {one.device.type for one in model.parameters()} == {"meta"}


def test_words_are_refused_until_learned() -> None:
    """The count of steps is a buffer, so that it is saved with what was measured."""
    words = WordPrompt(6, 32)
    with torch.no_grad():
        assert words(torch.randn(3, 6)).shape == (3, 1, 32)
    assert not words.trained and words.learns
    words(torch.randn(3, 6))
    assert words.trained and "steps" in words.state_dict()


def test_plan_on_decoder(tmp_path: Path) -> None:
    assembled = build(tiny_sam.config(tmp_path), torch.float32)
    connector = assembled.model.connector
    plan = apply_plan(assembled.model.parts(), [[Adapt(method="full", where="connector")]])
    assert plan.table()[1]["trainable"] == count(connector)
    assert list(assembled.statistics()) == [
        "decoder.prompt_encoder.shared_embedding.made.positional_embedding"
    ]


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
