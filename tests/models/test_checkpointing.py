"""with_cp: the same training step in all backbones, with blocks computed twice."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmcastling.models import CastlingLeViT, CastlingMViT, CastlingViT
from mmcastling.models.castling_vit import CastlingEncoderLayer
from mmcastling.models.levit_blocks import GridResidual
from mmcastling.models.mvit_blocks import CastlingMultiScaleBlock
from mmcastling.verbs import castling_modules, set_mask

FAMILIES = {
    "vit": (
        CastlingViT,
        dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=32),
        CastlingEncoderLayer,
        3,
    ),
    "levit": (
        CastlingLeViT,
        dict(embed_dims=[16, 24], key_dims=[4, 4], num_heads=[2, 3], depths=[1, 1]),
        GridResidual,
        5,
    ),
    "mvit": (
        CastlingMViT,
        dict(embed_dims=8, num_layers=3, num_heads=1, downscale_indices=[1]),
        CastlingMultiScaleBlock,
        3,
    ),
}


def step(family, with_cp, branch, compile=False):
    """One training step: the backbone after it, and how often blocks were called."""
    cls, arch, block, _ = FAMILIES[family]
    torch.manual_seed(0)
    backbone = cls(
        arch,
        ffn_conv=3,
        drop_path_rate=0.3,
        attention=dict(mask_threshold="1/N", local_conv="grid"),
        with_cp=with_cp,
    ).train()
    set_mask(backbone, "1/N" if branch else 1.0)
    calls = []
    for module in backbone.modules():
        if isinstance(module, block):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    x = torch.randn(4, 3, 64, 96)
    forward = torch.compile(backbone, backend="aot_eager") if compile else backbone
    (forward(x)[0] ** 3).sum().backward()
    return backbone, len(calls)


@pytest.mark.parametrize("branch", [True, False], ids=["branch_on", "branch_off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_statistics_are_the_same(family, branch):
    plain, calls = step(family, with_cp=False, branch=branch)
    recomputed, calls_twice = step(family, with_cp=True, branch=branch)

    blocks = FAMILIES[family][3]
    assert (calls, calls_twice) == (blocks, 2 * blocks)
    assert all(p.grad.isfinite().all() for p in plain.parameters())
    assert sum(p.grad.abs().sum() > 0 for p in plain.parameters()) > 5
    for (name, p), q in zip(
        plain.named_parameters(), recomputed.parameters(), strict=True
    ):
        assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
    # Batch norms count the batch once, and dropped paths are the same ones.
    assert_close(dict(plain.named_buffers()), dict(recomputed.named_buffers()))
    if family == "levit":
        counted = [b for n, b in recomputed.named_buffers() if "num_batches" in n]
        assert counted and all(count == 1 for count in counted)
    for (_, a), (_, b) in zip(
        castling_modules(plain), castling_modules(recomputed), strict=True
    ):
        assert (a.branch.density > 0) == branch
        assert_close(a.branch.density, b.branch.density)


def test_statistics_are_tracked_again_after_the_step():
    backbone, _ = step("levit", with_cp=True, branch=True)
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm1d)]
    assert norms and all(norm.momentum == 0.1 for norm in norms)
    before = backbone.stages[0][0].block.qkv.bn.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))[0].sum().backward()
    assert not torch.equal(backbone.stages[0][0].block.qkv.bn.running_mean, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_recomputed_without_gradients(family):
    cls, arch, block, blocks = FAMILIES[family]
    backbone = cls(arch, with_cp=True).eval()
    calls = []
    for module in backbone.modules():
        if isinstance(module, block):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        backbone(torch.randn(1, 3, 64, 64))
    assert len(calls) == blocks


@pytest.mark.slow
def test_a_compiled_step_counts_statistics_once_too():
    plain, _ = step("levit", with_cp=False, branch=True)
    compiled, _ = step("levit", with_cp=True, branch=True, compile=True)
    buffers = dict(plain.named_buffers())
    assert_close(buffers, dict(compiled.named_buffers()), atol=1e-5, rtol=1e-4)
    for (name, p), q in zip(
        plain.named_parameters(), compiled.parameters(), strict=True
    ):
        close = dict(atol=1e-3, rtol=1e-3)
        assert_close(p.grad, q.grad, msg=lambda text, name=name: name + text, **close)
