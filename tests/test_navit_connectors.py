"""Connectors on images of different sizes: packed is each image alone, as it would be with one size."""

from __future__ import annotations

import pytest
import torch
from test_connectors import OPTIONS

from vlm_adapt.connectors import CONNECTORS, build_connector
from vlm_adapt.connectors.packed import VARIES, PackedFeatures
from vlm_adapt.errors import UserError

GRIDS = [(4, 2), (2, 2), (4, 6), (2, 8), (4, 2)]


def packed(layers: int = 1, seed: int = 0) -> PackedFeatures:
    generator = torch.Generator().manual_seed(seed)
    lengths = [rows * columns for rows, columns in GRIDS]
    made = [torch.randn(sum(lengths), 16, generator=generator) for _ in range(layers)]
    return PackedFeatures([one.requires_grad_() for one in made], GRIDS, lengths)


@pytest.mark.parametrize("output_scale", [False, True])
@pytest.mark.parametrize("name", list(CONNECTORS))
@pytest.mark.parametrize("layers", [1, 2])
def test_packed_is_each_image_alone(name: str, layers: int, output_scale: bool) -> None:
    torch.manual_seed(0)
    options = OPTIONS[name] | {"output_scale": output_scale}
    varied = build_connector(name, [16] * layers, [VARIES] * layers, 12, embedding_rms=0.3, **options)
    varied.eval()
    features = packed(layers)
    found = varied(features)
    expected = []
    for image, (rows, columns) in enumerate(GRIDS):
        alone = build_connector(
            name, [16] * layers, [(rows, columns)] * layers, 12, embedding_rms=0.3, **options
        )
        alone.load_state_dict(varied.state_dict())
        one = [layer.split(features.lengths)[image][None] for layer in features.layers]
        expected.append(alone.eval()(one)[0])
        assert varied.tokens(rows, columns) == len(expected[-1]) == alone.tokens_per_image
    # The same sums in products of other shapes; a fresh projection's small outputs are normalised to 0.3.
    assert (found - torch.cat(expected)).abs().max() < 2e-6
    weight = torch.randn(found.shape)
    inputs = [*features.layers, *varied.parameters()]
    mine = torch.autograd.grad((found * weight).sum(), inputs, allow_unused=True)
    found = torch.cat([varied(features.select([image])) for image in range(len(GRIDS))])
    theirs = torch.autograd.grad((found * weight).sum(), inputs, allow_unused=True)
    for own, other in zip(mine, theirs, strict=True):
        assert own is not None and other is not None
        # Gradients sum over all tokens: the same relative error on a larger number.
        assert (own - other).abs().max() < 2e-6 * max(1, other.abs().max())


def test_dropped_patches_give_fewer_tokens_or_are_refused() -> None:
    lengths = [3, 1, 20, 5, 8]
    features = PackedFeatures([torch.randn(sum(lengths), 16)], GRIDS, lengths)
    for name, tokens in (("linear", sum(lengths)), ("mlp", sum(lengths)), ("resampler", 25), ("qformer", 25)):
        connector = build_connector(name, [16], [VARIES], 12, **OPTIONS[name])
        assert len(connector(features)) == tokens
        assert tokens == sum(connector.tokens(*grid, kept) for grid, kept in zip(GRIDS, lengths, strict=True))
        connector.check_varied(drops=True, pooled=True)
    shuffle = build_connector("pixel_shuffle", [16], [VARIES], 12)
    assert shuffle.multiple == 2
    shuffle.check_varied(drops=False, pooled=False)
    with pytest.raises(UserError, match="PixelShuffle connector needs every patch .*drop to 0"):
        shuffle.check_varied(drops=True, pooled=False)
    with pytest.raises(UserError, match="joins patches"):
        shuffle.check_varied(drops=False, pooled=True)


def test_pixel_shuffle_by_hand() -> None:
    """Patches 0 1 / 2 3 / 4 5 / 6 7 of a grid of 4 x 2, then 0 1 2 3 / 4 5 6 7."""
    from vlm_adapt.connectors.packed import grouped

    numbers = torch.arange(16.0)[:, None]
    groups = grouped(numbers, [(4, 2), (2, 4)], 2).tolist()
    assert groups == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_statistics_of_packed_features_are_over_all_patches() -> None:
    connector = build_connector("linear", [16, 16], [VARIES] * 2, 12, normalise="data")
    features = packed(2)
    connector.gather.calibrate([layer[None] for layer in features.layers])
    first = torch.cat([(layer - layer.mean(0)) / layer.std(0) for layer in features.layers], 1)
    # One division and one product of numbers around 1.
    torch.testing.assert_close(connector(features), connector.linear(first), rtol=0, atol=2e-6)


def test_what_needs_one_size_says_so() -> None:
    with pytest.raises(UserError, match="grid is for images of one size"):
        build_connector("linear", [16], [VARIES], 12, grid=2)
    with pytest.raises(UserError, match="features of 16 channels and got 8"):
        build_connector("linear", [16], [VARIES], 12)(PackedFeatures([torch.zeros(4, 8)], [(2, 2)], [4]))


def test_every_connector_says_how_many_tokens() -> None:
    for name in CONNECTORS:
        fixed = build_connector(name, [16], [(4, 6)], 12, **OPTIONS[name])
        assert fixed.tokens(4, 6) == fixed.tokens_per_image
