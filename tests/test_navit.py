"""NaViT: packing, the equality of packed and alone, positions by their formulas, pooling, and settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from vlm_adapt.errors import UserError
from vlm_adapt.vision import build_tower
from vlm_adapt.vision.navit_positions import FOURIER_SCALE, FactorisedPositions
from vlm_adapt.vision.packing import BACKENDS, Layout, Packed, attend, first_fit

TINY = {"width": 32, "depth": 2, "heads": 4, "patch": 4, "max_side": 12}
GRIDS = ((3, 5), (1, 1), (4, 2), (3, 5), (1, 7), (2, 4))


def tower(**options: Any) -> Any:
    return build_tower("navit:tiny", "random:0", options=TINY | {"native": {"max_patches": 40}} | options)


def images(grids: Any = GRIDS, kept: Any = None, seed: int = 0, values: int = 48) -> list[Packed]:
    """Each image alone: random patches, all of them or those of `kept`."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, (rows, columns) in enumerate(grids):
        places = torch.arange(rows * columns)
        if kept is not None:
            places = places[kept[number]]
        pixels = torch.randn(rows * columns, values, generator=generator)[places]
        made.append(Packed(pixels, places, ((rows, columns),), (len(places),)))
    return made


def together(alone: list[Packed]) -> Packed:
    return Packed(
        torch.cat([one.pixels_TV for one in alone]),
        torch.cat([one.places_T for one in alone]),
        tuple(grid for one in alone for grid in one.grids),
        tuple(length for one in alone for length in one.lengths),
    )


def gradients(model: Any, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
@settings(max_examples=200, deadline=None)
def test_first_fit_takes_every_image_once_and_no_more_than_fits(lengths: list[int], most: int) -> None:
    sequences = first_fit(lengths, most)
    assert sorted(image for images in sequences for image in images) == list(range(len(lengths)))
    totals = [sum(lengths[image] for image in images) for images in sequences]
    assert all(0 < total <= most for total in totals)
    # Greedy: the first image of a later sequence found no room in any earlier one.
    for number, images in enumerate(sequences):
        first = images[0]
        for earlier in sequences[:number]:
            before = sum(lengths[image] for image in earlier if image < first)
            assert before + lengths[first] > most


def test_first_fit_by_hand_and_an_image_too_long() -> None:
    assert first_fit([5, 4, 3, 2, 6], 8) == [[0, 2], [1, 3], [4]]
    with pytest.raises(ValueError, match="image 1 has 9 tokens, a sequence 8"):
        first_fit([1, 9], 8)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 2), st.sampled_from(list(BACKENDS))
)
@settings(max_examples=60, deadline=None)
def test_a_layout_puts_every_token_once_and_back(lengths: list[int], prefix: int, backend: str) -> None:
    layout = Layout(lengths, prefix, backend, 20)
    patches_T1 = torch.arange(1.0, sum(lengths) + 1)[:, None]
    prefix_F1 = -torch.arange(1.0, prefix + 1)[:, None] if prefix else None
    tokens_T1 = layout.arrange(patches_T1, prefix_F1)
    assert len(tokens_T1) == sum(lengths) + prefix * len(lengths)
    assert torch.equal(layout.patches(tokens_T1), patches_T1)
    starts = np.cumsum([0, *lengths])
    place = 0
    for image in layout.order:  # each image's prefix, then its patches, in order
        expected = [
            *(-number for number in range(1, prefix + 1)),
            *range(starts[image] + 1, starts[image + 1] + 1),
        ]
        assert tokens_T1[place : place + len(expected), 0].tolist() == expected
        assert (layout.images_T[place : place + len(expected)] == image).all()
        place += len(expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_attention_stays_within_an_image(backend: str) -> None:
    torch.manual_seed(0)
    lengths = [5, 3, 5, 1, 7]
    layout = Layout(lengths, 0, backend, 9)
    q, k, v = (torch.randn(sum(lengths), 2, 4) for _ in range(3))
    out = layout.patches(attend(*(layout.arrange(t) for t in (q, k, v)), layout, 0.3))
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        weights = (torch.einsum("the,she->hts", q[own], k[own]) * 0.3).softmax(-1)
        expected = torch.einsum("hts,she->the", weights, v[own])
        # Sums of at most seven float32 numbers around 1.
        torch.testing.assert_close(out[own], expected, rtol=0, atol=1e-6)
        start += length
    if backend == "flex":
        with pytest.raises(UserError, match="trains on a GPU only"):
            attend(q.requires_grad_(), k, v, layout, 0.3)


VARIANTS: dict[str, dict[str, Any]] = {
    "images": {},
    "dense": {"native": {"max_patches": 40, "attention": "dense"}},
    "fractional": {"coordinates": "fractional", "positions": "fourier", "norm": "rms", "bias": True},
    "pool": {"pool": True, "positions": "sinusoidal", "combine": "concat"},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_packed_is_each_image_alone(variant: str) -> None:
    model = tower(**VARIANTS[variant])
    alone, packed = images(), together(images())
    layers = [-1] if variant == "pool" else [0, -1]
    apart = [model(one, layers) for one in alone]
    expected = [torch.cat(layer) for layer in zip(*apart, strict=True)]
    found = model(packed, layers)
    for mine, theirs in zip(found, expected, strict=True):
        # The same sums in products of other shapes: features are around 1.
        assert mine.shape == theirs.shape and (mine - theirs).abs().max() < 1e-6
    assert len(found[0]) == (len(GRIDS) if variant == "pool" else sum(packed.lengths))
    own, other = gradients(model, model(packed, layers)), gradients(model, expected)
    assert set(own) == set(other) == {name for name, _ in model.named_parameters()}
    for name, gradient in own.items():
        # A gradient sums over all tokens: the same relative error on a larger number.
        assert (gradient - other[name]).abs().max() < 1e-6 * max(10, other[name].abs().max()), name


def test_the_order_of_images_does_not_matter() -> None:
    model, alone = tower(), images()
    order = [4, 2, 0, 5, 1, 3]
    first = model(together(alone))[0].split(list(together(alone).lengths))
    mixed = together([alone[image] for image in order])
    for image, features in zip(order, model(mixed)[0].split(list(mixed.lengths)), strict=True):
        assert (features - first[image]).abs().max() < 1e-6  # as above


def test_dropped_patches_keep_their_coordinates_and_the_others_are_not_seen() -> None:
    model = tower()
    kept = [torch.tensor([0, 4, 7, 14]), torch.tensor([0]), torch.tensor([5, 6])]
    some = together(images(GRIDS[:3], kept))
    assert some.coordinates_T2.tolist() == [[0, 0], [0, 4], [1, 2], [2, 4], [0, 0], [2, 1], [3, 0]]
    expected = []
    for one, places in zip(images(GRIDS[:3]), kept, strict=True):
        # Embedded whole, then dropped, then run through the blocks by hand.
        rows, columns = one.grids[0]
        at = torch.tensor([[r, c] for r in range(rows) for c in range(columns)])
        tokens = model.patch_embedding(one.pixels_TV)
        tokens = tokens + model.positions(at, torch.tensor(one.grids).expand(len(at), 2))
        hidden = tokens[places][None]
        for block in model.blocks:
            hidden = block(hidden, Layout([len(places)]))
        expected.append(model.norm(hidden[0]))
    assert (model(some)[0] - torch.cat(expected)).abs().max() < 1e-6  # as above
    pixels = some.pixels_TV.clone()
    changed = model(Packed(pixels, (some.places_T + 1) % 2, some.grids, some.lengths))[0]
    assert (changed - model(some)[0]).abs().max() > 1e-3  # places are read


def test_a_block_by_its_formula() -> None:
    """Pre-norm, normalised queries and keys, scores over the root of a head's width, GELU."""
    model = tower()
    x_TD = torch.randn(6, 32)
    block = model.blocks[0]
    attention = block.attention
    y = functional.layer_norm(x_TD, (32,), block.norm1.weight, None, 1e-6)
    q, k, v = (y @ p.weight.T for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = []
    for h in range(4):
        own = slice(8 * h, 8 * h + 8)
        query = functional.layer_norm(q[:, own], (8,), attention.q_norm.weight, None, 1e-6)
        key = functional.layer_norm(k[:, own], (8,), attention.k_norm.weight, None, 1e-6)
        heads.append((query @ key.T / math.sqrt(8)).softmax(-1) @ v[:, own])
    x = x_TD + torch.cat(heads, 1) @ attention.out_proj.weight.T
    y = functional.layer_norm(x, (32,), block.norm2.weight, None, 1e-6)
    expected = x + functional.gelu(y @ block.mlp.fc1.weight.T) @ block.mlp.fc2.weight.T
    # The same sums in another order.
    assert (block(x_TD[None], Layout([6]))[0] - expected).abs().max() < 1e-6
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


@pytest.mark.parametrize("combine", ["sum", "product", "concat"])
@pytest.mark.parametrize("coordinates", ["absolute", "fractional"])
@pytest.mark.parametrize("function", ["learned", "sinusoidal", "fourier"])
def test_positions_by_their_formulas(function: str, coordinates: str, combine: str) -> None:
    torch.manual_seed(0)
    most, width = 12, 8
    made = FactorisedPositions(width, function, coordinates, combine, most)
    at, sides = torch.tensor([[0, 0], [2, 6], [3, 1]]), torch.tensor([[1, 1], [4, 7], [5, 3]])
    each = width // 2 if combine == "concat" else width
    halves = []
    for axis, part in ((0, made.rows), (1, made.columns)):
        rows = []
        for p, side in zip(at[:, axis].tolist(), sides[:, axis].tolist(), strict=True):
            r = p / side
            if function == "learned" and coordinates == "absolute":
                rows.append(part.table[p].detach())
            elif function == "learned":
                place = r * (most - 1)
                low = int(place)
                rows.append(
                    part.table[low].detach() * (1 - place + low)
                    + part.table[low + 1].detach() * (place - low)
                )
            elif function == "sinusoidal":
                c = r * most if coordinates == "fractional" else p
                waves = [10000 ** (-i / (each // 2)) for i in range(each // 2)]
                rows.append(torch.tensor([math.sin(c * w) for w in waves] + [math.cos(c * w) for w in waves]))
            else:
                c = FOURIER_SCALE * (r if coordinates == "fractional" else p / most)
                b = part.frequencies.tolist()
                turned = [math.cos(2 * math.pi * f * c) for f in b] + [
                    math.sin(2 * math.pi * f * c) for f in b
                ]
                rows.append(part.linear.weight.detach() @ torch.tensor(turned))
        halves.append(torch.stack(rows))
    expected = {
        "sum": halves[0] + halves[1],
        "product": halves[0] * halves[1],
        "concat": torch.cat([halves[0][:, :4], halves[1][:, :4]], 1),
    }[combine]
    # Angles reach 100, of which float32 keeps 1e-5.
    torch.testing.assert_close(made(at, sides).detach(), expected, rtol=0, atol=2e-5)


def test_pooling_reads_each_image_by_its_formula() -> None:
    model = tower(pool=True)
    pool = model.pool
    features_TD, lengths = torch.randn(9, 32), (4, 1, 4)
    pooled_ID = pool(features_TD, lengths)
    for image, own in enumerate(features_TD.split(list(lengths))):
        query = pool.probe @ pool.q_proj.weight.T
        key, value = own @ pool.k_proj.weight.T, own @ pool.v_proj.weight.T
        heads = [
            (key[:, h : h + 8] @ query[h : h + 8] / math.sqrt(8)).softmax(0) @ value[:, h : h + 8]
            for h in range(0, 32, 8)
        ]
        mixed = torch.cat(heads) @ pool.out_proj.weight.T
        normed = functional.layer_norm(mixed, (32,), pool.norm.weight, None, 1e-6)
        expected = mixed + functional.gelu(normed @ pool.mlp.fc1.weight.T) @ pool.mlp.fc2.weight.T
        assert (pooled_ID[image] - expected).abs().max() < 1e-6  # the same sums in another order


def test_checkpointing_gives_the_same_gradients() -> None:
    model, packed = tower(), together(images())
    first = gradients(model, model(packed))
    model.set_activation_checkpointing(True)
    for name, gradient in gradients(model, model(packed)).items():
        assert torch.equal(gradient, first[name])
    assert model.unused_modules([0]) == ["layers.1", "norm"]


def test_in_bf16_packed_is_still_each_image_alone() -> None:
    """Weights in bf16, and float32 weights under autocast."""
    for model, autocast in ((tower().to(torch.bfloat16), False), (tower(), True)):
        alone, packed = images(), together(images())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            cast = [replace(one, pixels_TV=one.pixels_TV.to(model.dtype)) for one in (*alone, packed)]
            apart, found = torch.cat([model(one)[0] for one in cast[:-1]]), model(cast[-1])[0]
        # bf16 keeps 8 bits of features around 1, rounded a few times in two blocks.
        assert (found.float() - apart.float()).abs().max() < 0.06
        found.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
