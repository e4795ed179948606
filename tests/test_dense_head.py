"""The dense head: counts, transformers' own neck, any pattern of grids, batch norms over ranks."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from typing import Any

import norm_ranks
import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTNeck

from vlm_adapt.errors import UserError
from vlm_adapt.heads import build_head, head_options
from vlm_adapt.heads.batch_norm import SharedBatchNorm
from vlm_adapt.heads.dpt import DptHead, scales

SWIN = ([8, 16, 32, 64], [(16, 12), (8, 6), (4, 3), (2, 2)])
PATTERNS = {
    "plain, with a class token": ([32] * 4, [(3, 5)] * 4, True),
    "plain, without": ([32] * 4, [(4, 4)] * 4, False),
    "hierarchical": (*SWIN, False),
    "odd and not square": ([8, 16, 32, 64], [(15, 20), (8, 10), (4, 5), (2, 3)], False),
    "two equal last stages": ([8, 16, 32, 32], [(16, 12), (8, 6), (4, 3), (4, 3)], False),
    "two equal stages within": ([8, 8, 16, 32], [(28, 28), (14, 14), (14, 14), (7, 7)], False),
    "one size, widths of their own": ([8, 8, 16, 16], [(4, 4)] * 4, False),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def features_of(
    widths: list[int], grids: list[tuple[int, int]], class_token: bool, images: int = 2
) -> list[Tensor]:
    more = 1 if class_token else 0
    return [
        torch.randn(images, rows * columns + more, width, requires_grad=True)
        for (rows, columns), width in zip(grids, widths, strict=True)
    ]


def test_counts_are_lsegs() -> None:
    """ViT-L: the neck of transformers; LSeg's decoder is convolutions, fusion, 1 x 1 head and a block."""
    with torch.device("meta"):
        head: Any = build_head("dpt", [1024] * 4, [(30, 30)] * 4, 512, True)
    assert count(head.neck) == 39_011_840
    assert (count(head.neck.convs), count(head.neck.fusion_stage)) == (6_488_064, 9_708_544)
    assert count(head.out) == 131_584
    assert count(head.neck.convs) + count(head.neck.fusion_stage) + count(head.out) + 10 == 16_328_202
    assert head.grid == (240, 240)  # half of 480


def test_it_is_transformers_neck() -> None:
    """Same weights, same numbers, on an image that is not square."""
    head: Any = build_head("dpt", [32] * 4, [(3, 5)] * 4, 7, True, channels=16, neck=[4, 8, 16, 32]).eval()
    config = DPTConfig(
        hidden_size=32,
        readout_type="project",
        reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_sizes=[4, 8, 16, 32],
        fusion_hidden_size=16,
        use_batch_norm_in_fusion_residual=True,
        use_bias_in_fusion_residual=False,
    )
    neck = DPTNeck(config).eval()
    neck.load_state_dict(head.neck.state_dict())
    features = features_of([32] * 4, [(3, 5)] * 4, True)
    with torch.no_grad():
        right = head.out(neck(features, 3, 5)[-1])
        torch.testing.assert_close(head(features), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_every_pattern_of_grids(pattern: str, norm: str) -> None:
    """The map is about twice the finest grid; what is said to be used gets a gradient, nothing else."""
    widths, grids, class_token = PATTERNS[pattern]
    head: Any = build_head("dpt", widths, grids, 20, class_token, channels=16, norm=norm).train()
    assert head.wants_class_token == class_token
    features = features_of(widths, grids, class_token)
    embeddings_NEhw = head(features)
    assert embeddings_NEhw.shape == (2, 20, *head.grid)
    embeddings_NEhw.square().sum().backward()
    unused = head.unused_modules()
    for name, parameter in head.named_parameters():
        assert (parameter.grad is None) == any(name.startswith(f"{one}.") for one in unused), name
    assert all(one.grad is not None and one.grad.any() for one in features)


def test_depths_are_brought_to_scale() -> None:
    assert scales(SWIN[1]) == [1, 1, 1, 1]
    assert scales([(15, 20), (8, 10), (4, 5), (2, 3)]) == [1, 1, 1, 1]
    assert scales([(256, 256), (128, 128), (64, 64), (64, 64)]) == [1, 1, 1, 0.5]  # MobileSAM's TinyViT
    assert scales([(14, 14)] * 4) == [4, 2, 1, 0.5]
    head: Any = build_head("dpt", *SWIN, 8, channels=8)
    assert head.neck.reassemble_stage is None and not len(head.resize)


@pytest.mark.parametrize("readout", ["project", "add", "ignore"])
def test_readout(readout: str) -> None:
    head: Any = build_head("dpt", [16] * 4, [(4, 4)] * 4, 8, True, channels=8, readout=readout).eval()
    features = features_of([16] * 4, [(4, 4)] * 4, True)
    if readout == "ignore":
        assert not head.wants_class_token
        head([one[:, 1:] for one in features])
        return
    with torch.no_grad():
        before = head(features)
        features[0][:, 0] += 1.0
        assert not torch.equal(head(features), before)


def test_a_frozen_tower_in_half_precision() -> None:
    head: Any = build_head("dpt", *SWIN, 8, channels=8)
    features = [one.detach().bfloat16() for one in features_of(*SWIN, False)]
    assert head(features).dtype == torch.float32
    half = head.to(torch.bfloat16)
    norms = [one for one in half.modules() if isinstance(one, SharedBatchNorm)]
    assert len(norms) == 16 and all(
        one.weight.dtype == one.running_mean.dtype == torch.float32 for one in norms
    )
    assert half.eval()(features).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert head.train()(features).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"widths": [8, 8], "grids": [(4, 4)] * 2}, "four depths"),
        ({"grids": [(0, 0)] * 4}, "one grid for all images"),
        ({"channels": 0}, "head.channels"),
        ({"norm": "bach"}, "did you mean 'batch'"),
        ({"neck": [1, 2]}, "head.neck"),
        ({"readout": "add"}, "no class token"),
        ({"readout": "sum"}, "head.readout is one of"),
        ({"chanels": 8}, "did you mean 'channels'"),
        ({"widths": [8, 16, 8, 8], "neck": [8, 8, 8, 8]}, "leave it out"),
    ],
)
def test_bad_settings(changes: dict[str, Any], word: str) -> None:
    settings = {"widths": [8] * 4, "grids": [(4, 4)] * 4, "embedding_size": 4} | changes
    with pytest.raises(UserError) as caught:
        build_head("dpt", **settings)
    assert word in tiny.sentence(caught)


def test_bad_names_and_features() -> None:
    with pytest.raises(UserError) as caught:
        build_head("dtp", *SWIN, 4)
    assert "did you mean 'dpt'" in tiny.sentence(caught)
    assert head_options("dpt") == {"channels": 256, "neck": None, "readout": None, "norm": "batch"}
    head = build_head("dpt", *SWIN, 4, channels=8)
    with pytest.raises(UserError) as caught:
        head(features_of(*SWIN, False)[::-1])
    assert "was built for features" in tiny.sentence(caught)


# Batch norms -------------------------------------------------------------------------------------


def test_alone_it_is_torchs() -> None:
    ours, torchs = SharedBatchNorm(3), nn.BatchNorm2d(3)
    maps_NChw = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(ours(maps_NChw), torchs(maps_NChw))
    assert ours.running_mean is not None and torchs.running_mean is not None
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.eval()(maps_NChw), torchs.eval()(maps_NChw))


def test_frozen_or_standing_in_it_stays_as_it_is() -> None:
    norm = SharedBatchNorm(3).requires_grad_(False)
    maps_NChw = 5 + torch.randn(2, 3, 4, 5)
    settled = copy.deepcopy(norm).eval()(maps_NChw)
    torch.testing.assert_close(norm.train()(maps_NChw), settled)
    norm.requires_grad_(True).counts = False  # an image that stands in for none
    torch.testing.assert_close(norm(maps_NChw), settled)
    assert norm.running_mean is not None and not norm.running_mean.any()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Values, gradients and running statistics of two processes are those of one with all images.

    Two images and one; and three and none, where an image that stands in is not counted.
    """
    shares = [[2, 1], [3, 0]]
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    torch.multiprocessing.start_processes(
        norm_ranks.run, args=(port, str(tmp_path), shares), nprocs=2, start_method="spawn"
    )
    maps_NChw, norm = norm_ranks.maps_of_all().requires_grad_(), SharedBatchNorm(3)
    out_NChw = norm(maps_NChw)
    out_NChw.pow(3).sum().backward()
    for number, share in enumerate(shares):
        first, second = (torch.load(tmp_path / f"{number}-{rank}", weights_only=True) for rank in (0, 1))
        found_out = torch.cat([first[0], second[0][: share[1]]])
        found_grad = torch.cat([first[1], second[1][: share[1]]])
        torch.testing.assert_close(found_out, out_NChw.detach(), rtol=1e-5, atol=1e-5)
        # A gradient is a difference of large sums.
        torch.testing.assert_close(found_grad, maps_NChw.grad, rtol=1e-4, atol=1e-4)
        for one in (first, second):
            torch.testing.assert_close(one[2], norm.weight.grad, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(one[3], norm.running_mean)
            torch.testing.assert_close(one[4], norm.running_var)


def test_statistics_are_saved_with_the_state() -> None:
    head = DptHead(*SWIN, 4, channels=8)
    names = [name for name, _ in head.named_buffers()]
    assert len(names) == 48 and set(names) <= set(head.state_dict())
