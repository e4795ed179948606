"""Connectors: shapes, counts by closed formulas, tokens per image, parity with transformers, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import Idefics3Config, LlavaConfig

from vlm_adapt.connectors import CONNECTORS, build_connector, connector_options
from vlm_adapt.connectors.gather import GatherLayers
from vlm_adapt.connectors.resampler import ResamplerBlock
from vlm_adapt.errors import UserError

TINY_QFORMER = {
    "config": {
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "queries": 5,
}
OPTIONS = {
    "linear": {},
    "mlp": {"pre_norm": True},
    "pixel_shuffle": {},
    "resampler": {"latents": 5, "depth": 2, "heads": 2, "head_width": 8},
    "qformer": TINY_QFORMER,
}
TOKENS = {"linear": 24, "mlp": 24, "pixel_shuffle": 6, "resampler": 5, "qformer": 5}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", list(CONNECTORS))
@pytest.mark.parametrize("feature_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_shape_and_gradient_of_every_parameter(name: str, feature_dtype: torch.dtype, autocast: bool) -> None:
    connector = build_connector(
        name, [16], [(4, 6)], 12, embedding_rms=0.3, output_scale=True, **OPTIONS[name]
    )
    features = [torch.randn(3, 24, 16, requires_grad=True)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens_NKD = connector([features[0].to(feature_dtype)])
    assert tokens_NKD.shape == (3, connector.tokens_per_image, 12)
    assert connector.tokens_per_image == TOKENS[name]
    (tokens_NKD.float() * torch.randn(tokens_NKD.shape)).sum().backward()
    for parameter_name, parameter in connector.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
    assert features[0].grad is not None and features[0].grad.abs().sum() > 0


@pytest.mark.parametrize("name", list(CONNECTORS))
def test_output_scale_sets_the_root_mean_square(name: str) -> None:
    features = [torch.randn(2, 24, 16) * 7]
    connector = build_connector(
        name, [16], [(4, 6)], 12, embedding_rms=0.03, output_scale=True, **OPTIONS[name]
    )
    rms_NK = connector(features).square().mean(-1).sqrt()
    # A LayerNorm's output has unit deviation up to its eps (1e-8 against variances above 1e-3).
    torch.testing.assert_close(rms_NK, torch.full_like(rms_NK, 0.03), rtol=1e-4, atol=0)
    with pytest.raises(UserError, match="root mean square"):
        build_connector(name, [16], [(4, 6)], 12, output_scale=True, **OPTIONS[name])


def test_counts_by_closed_formulas() -> None:
    v, d, p = 20, 12, 16
    grid = (4, 4)
    assert count(build_connector("linear", [v], [grid], d)) == v * d + d
    assert count(build_connector("linear", [v], [grid], d, bias=False)) == v * d
    for layers in (1, 2, 3):
        mlp = build_connector("mlp", [v], [grid], d, layers=layers)
        assert count(mlp) == v * d + d + (layers - 1) * (d * d + d)
    assert count(build_connector("mlp", [v], [grid], d, pre_norm=True)) == 2 * v + v * d + d + d * d + d
    assert count(build_connector("pixel_shuffle", [v], [grid], d, factor=4)) == 16 * v * d
    two = build_connector("pixel_shuffle", [v], [grid], d, factor=2, layers=2, bias=True)
    assert count(two) == 4 * v * d + d + d * d + d
    k, depth, inner = 7, 3, 2 * 8
    for width in (v, 32):
        resampler = build_connector(
            "resampler", [v], [grid], d, latents=k, depth=depth, heads=2, head_width=8, width=width
        )
        w = width
        expected = k * w + depth * (6 * w + 4 * w * inner + 8 * w * w) + 2 * w + w * d + d
        assert count(resampler) == expected + (0 if width == v else v * w + w)
    assert [build_connector("linear", [v], [grid], d).tokens_per_image, p] == [p, p]


def test_qformer_is_blip2s_by_default() -> None:
    with torch.device("meta"):
        connector = build_connector("qformer", [1408], [(16, 16)], 2560)
    w, layers, crossed = 768, 12, 6
    attention, norm, feed_forward = 4 * (w * w + w), 2 * w, 2 * 4 * w * w + 5 * w
    cross = 2 * (w * w + w) + 2 * (1408 * w + w) + norm
    transformer = layers * (attention + feed_forward + 2 * norm) + crossed * cross + norm
    assert count(connector.qformer) == transformer == 105_137_664
    assert count(connector) == transformer + 32 * w + w * 2560 + 2560
    assert connector.tokens_per_image == 32


def test_queries_start_apart() -> None:
    connector = build_connector("qformer", [16], [(4, 6)], 12, **TINY_QFORMER)
    tokens_NKD = connector([torch.randn(1, 24, 16)])
    assert (tokens_NKD[0, 0] - tokens_NKD[0, 1]).abs().max() > 1e-3


def test_resampler_reads_all_patches_in_any_order() -> None:
    connector = build_connector("resampler", [16], [(4, 6)], 12, **OPTIONS["resampler"])
    features_NPV = torch.randn(1, 24, 16)
    tokens_NKD = connector([features_NPV])
    order = torch.randperm(24)
    # Attention over a set: only the order of float sums differs.
    torch.testing.assert_close(connector([features_NPV[:, order]]), tokens_NKD, rtol=1e-4, atol=1e-5)
    features_NPV[:, 5] = torch.randn(16)
    assert (connector([features_NPV]) - tokens_NKD).abs().max() > 1e-5


def test_resampler_block_attends_to_features_and_latents() -> None:
    block = ResamplerBlock(width=12, heads=2, head_width=4, expansion=4)
    features_PW, latents_KW = torch.randn(5, 12), torch.randn(3, 12)
    normed_KW = block.norm_latents(latents_KW)
    media_SW = torch.cat([block.norm_features(features_PW), normed_KW])
    query, key, value = block.to_query(normed_KW), *block.to_key_value(media_SW).chunk(2, -1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights_KS = (query[:, head] @ key[:, head].T / 2).softmax(-1)  # 2 is the root of 4 channels a head
        heads.append(weights_KS @ value[:, head])
    expected_KW = latents_KW + block.to_out(torch.cat(heads, -1))
    expected_KW = expected_KW + block.feed_forward(expected_KW)
    # The same sums in another order, of numbers around 1.
    torch.testing.assert_close(
        block(features_PW[None], latents_KW[None])[0], expected_KW, rtol=1e-5, atol=1e-5
    )


def test_mlp_is_llavas_projector() -> None:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 16, "num_attention_heads": 2},
        text_config={"model_type": "llama", "hidden_size": 12, "num_attention_heads": 2},
    )
    theirs = LlavaMultiModalProjector(config)
    ours = build_connector("mlp", [16], [(2, 2)], 12)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    features_NPV = torch.randn(2, 4, 16)
    # The very same operations on the same numbers.
    assert torch.equal(ours([features_NPV]), theirs(features_NPV))


def test_pixel_shuffle_is_idefics3s() -> None:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    config = Idefics3Config(
        vision_config={"hidden_size": 8},
        text_config={"hidden_size": 12, "num_attention_heads": 2},
        scale_factor=3,
    )
    theirs = Idefics3Connector(config)
    ours = build_connector("pixel_shuffle", [8], [(6, 6)], 12, factor=3)
    ours.load_state_dict({"linear_1.weight": theirs.state_dict()["modality_projection.proj.weight"]})
    features_NPV = torch.randn(2, 36, 8)
    torch.testing.assert_close(ours([features_NPV]), theirs(features_NPV), rtol=1e-6, atol=1e-6)


def test_pixel_shuffle_needs_a_grid_it_divides() -> None:
    with pytest.raises(UserError, match="pixel shuffle by 2 .* 3 x 5"):
        build_connector("pixel_shuffle", [8], [(3, 5)], 12)


def test_one_layer_without_options_is_left_alone() -> None:
    features_NPV = torch.randn(2, 24, 16)
    assert GatherLayers([16], [(4, 6)])([features_NPV]) is features_NPV
    assert not list(GatherLayers([16, 8], [(4, 6), (2, 3)]).parameters())
    assert not GatherLayers([16, 8], [(4, 6), (2, 3)]).state_dict()


@pytest.mark.parametrize("target", [(4, 4), (8, 8), (3, 5), (16, 16), (10, 3)])
def test_gathered_layers_are_normalised_resized_and_joined_in_order(target: tuple[int, int]) -> None:
    grids, widths = [(8, 8), (4, 4)], [6, 10]
    gather = GatherLayers(widths, grids, target)
    assert gather.width == 16 and gather.grid == target
    features = [torch.randn(2, 64, 6), torch.randn(2, 16, 10)]
    expected = []
    for features_NPV, grid, width in zip(features, grids, widths, strict=True):
        map_NVhw = F.layer_norm(features_NPV, (width,)).transpose(1, 2).unflatten(2, grid)
        for axis in (0, 1):  # one axis at a time: fewer by averaging, more by interpolation
            size = list(map_NVhw.shape[2:])
            size[axis] = target[axis]
            if target[axis] <= grid[axis]:
                map_NVhw = F.adaptive_avg_pool2d(map_NVhw, size)
            else:
                map_NVhw = F.interpolate(map_NVhw, size=size, mode="bilinear", align_corners=False)
        expected.append(map_NVhw.flatten(2).transpose(1, 2))
    # Sums of at most eight float32 numbers around 1, in another order.
    torch.testing.assert_close(gather(features), torch.cat(expected, -1), rtol=1e-5, atol=1e-5)


def test_gather_names_what_does_not_fit() -> None:
    gather = GatherLayers([6], [(4, 4)])
    with pytest.raises(UserError, match="built for 1 layers and got 2"):
        gather([torch.zeros(1, 16, 6)] * 2)
    with pytest.raises(UserError, match="16 x 6 and got 9 x 6"):
        gather([torch.zeros(1, 9, 6)])
    with pytest.raises(UserError, match="grid is one number"):
        GatherLayers([6], [(4, 4)], grid=0)


def test_unknown_names_and_values() -> None:
    with pytest.raises(UserError, match="did you mean 'resampler'"):
        build_connector("resampeler", [8], [(2, 2)], 4)
    with pytest.raises(UserError, match="'latent'.*did you mean 'latents'"):
        build_connector("resampler", [8], [(2, 2)], 4, latent=3)
    with pytest.raises(UserError, match="layers is a whole number from 1"):
        build_connector("mlp", [8], [(2, 2)], 4, layers=0)
    with pytest.raises(UserError, match="unknown activation 'gelo'"):
        build_connector("mlp", [8], [(2, 2)], 4, activation="gelo")
    with pytest.raises(UserError, match="did you mean 'hidden_size'"):
        build_connector("qformer", [8], [(2, 2)], 4, config={"hiden_size": 8})
    with pytest.raises(UserError, match="Q-Former's config cannot be used"):
        build_connector("qformer", [8], [(2, 2)], 4, config={"hidden_size": "wide"})
    with pytest.raises(UserError, match="not a multiple"):
        build_connector("qformer", [8], [(2, 2)], 4, config={"hidden_size": 25})
    assert {"grid", "normalise", "output_scale", "factor"} <= set(connector_options("pixel_shuffle"))
