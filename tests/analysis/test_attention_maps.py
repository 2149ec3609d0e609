"""Rows of attention matrices: against loops by hand, and against what a model made."""

import math

import pytest
import torch
from mmpretrain.models.backbones import VisionTransformer
from torch import nn
from torch.testing import assert_close

from mmcastling.analysis.attention_maps import OFF, MixerCall, record_attention
from mmcastling.attention import CastlingMixer, MaskThreshold, l2_normalize
from mmcastling.attention.local_conv import merge_heads
from mmcastling.castle import castle
from mmcastling.models import CastlingLeViT, CastlingMViT, CastlingViT
from mmcastling.verbs import set_mask, switch_to_deploy

VIT = dict(embed_dims=24, num_layers=3, num_heads=3, feedforward_channels=32)
LEVIT = dict(
    embed_dims=[16, 24, 32], key_dims=[4, 4, 4], num_heads=[2, 2, 4], depths=[1, 1, 1]
)
MVIT = dict(embed_dims=8, num_layers=4, num_heads=1, downscale_indices=[1, 2])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention_rows(q, k, query, threshold=OFF, weight=1.0, mixer=None, **options):
    mixer = mixer or CastlingMixer(*q.shape[::2], **options)
    call = MixerCall("mixer", mixer, q, k, k, (1, k.shape[1]))
    return call.rows(query, MaskThreshold.parse(threshold), weight)


def rows_of(call, query):
    branch = call.mixer.branch
    return call.rows(
        query, *((branch.threshold, branch.weight) if branch else (OFF, 1))
    )


# ------------------------------------------------------------------------------- rows


def test_rows_equal_loops_over_pairs():
    heads, tokens, dims, query = 2, 5, 3, 3
    q, k = draw(heads, tokens, dims), draw(heads, tokens, dims, seed=1)
    rows = attention_rows(q, k, query, threshold="1/N", weight=0.7, reference_tokens=15)
    for h in range(heads):
        dots = [float(q[h, query] @ k[h, j]) for j in range(tokens)]
        exps = [math.exp(dot / math.sqrt(dims)) for dot in dots]
        for j in range(tokens):
            p = exps[j] / sum(exps)
            lengths = float(q[h, query].norm() * k[h, j].norm())
            angular = 15 / 5 * dots[j] / lengths / math.pi + (0.5 if j == query else 0)
            masked = 0.7 * p if p > 1 / 5 else 0.0
            expected = (p, angular, masked, masked + angular)
            for row, value in zip(vars(rows).values(), expected, strict=True):
                assert row[h, j].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.15, "1/N", 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(reference_tokens=4),
        dict(form="average", center_keys=True),
        dict(form="learned", center_keys=True),
        dict(form="landmarks", landmarks=2),
    ],
)
@torch.no_grad()
def test_combined_rows_times_values_are_what_the_mixer_mixes(threshold, options):
    mixer = CastlingMixer(2, 6, local_conv=None, norm_output=False, **options)
    for factor in mixer.parameters():
        factor.copy_(torch.tensor([0.3, -1.2]))
    mixer.set_mask(threshold, weight=0.8)
    q, k, v = draw(2, 7, 4), draw(2, 7, 4, seed=1), draw(2, 7, 6, seed=2)
    expected = mixer(q[None], k[None], v[None], (1, 7))[0]
    for query in range(7):
        rows = attention_rows(q, k, query, threshold=threshold, weight=0.8, mixer=mixer)
        assert_close((rows.combined.unsqueeze(1) @ v).squeeze(1), expected[:, query])
        assert_close(rows.softmax.sum(dim=1), torch.ones(2))


def test_a_branch_that_is_off_keeps_not_even_certain_attention():
    k = torch.tensor([[[100.0, 0.0], [-100.0, 0.0]]])
    rows = attention_rows(k, k, 0, threshold=1.0)
    assert rows.softmax[0].tolist() == [1.0, 0.0]
    assert rows.masked.count_nonzero() == 0
    assert_close(rows.combined, rows.angular)


def test_heads_are_averaged_or_chosen():
    rows = attention_rows(draw(3, 5, 4), draw(3, 5, 4, seed=1), 2)
    assert_close(rows.reduce_heads(None).softmax, rows.softmax.mean(dim=0))
    assert_close(rows.reduce_heads(1).angular, rows.angular[1])
    with pytest.raises(ValueError, match=r"head 3 does not exist: .* heads 0 to 2"):
        rows.reduce_heads(3)


# -------------------------------------------------------------------------- recording


def build(name):
    model = _build(name)
    model.eval()  # mmpretrain's returns nothing
    return model


def _build(name):
    torch.manual_seed(0)
    if name == "levit":
        return CastlingLeViT(arch=LEVIT, img_size=64)
    if name == "mvit":
        return CastlingMViT(arch=MVIT, img_size=32)
    if name == "castled":
        model = VisionTransformer(VIT, img_size=32, patch_size=8)
        return castle(model, form="learned", local_conv="token")
    return CastlingViT(
        VIT, img_size=32, patch_size=8, with_cls_token=name == "vit-cls", out_type="raw"
    )


GRIDS = {
    "vit": [(4, 6)] * 3,
    "vit-cls": [(4, 6)] * 3,
    "castled": [(4, 6)] * 3,
    "levit": [(2, 3), (2, 3), (1, 2), (1, 2), (1, 1)],
    "mvit": [(8, 12), (8, 12), (4, 6), (2, 3)],
}


@pytest.mark.parametrize("deploy", [False, True], ids=["branch on", "deployed"])
@pytest.mark.parametrize("name", GRIDS)
def test_recorded_rows_reproduce_what_the_attention_made(name, deploy):
    model = build(name)
    set_mask(model, "1/N", 0.5)
    if deploy:
        switch_to_deploy(model, inplace=True)
    image = draw(1, 3, 32, 48)
    for layer, grid in enumerate(GRIDS[name]):
        made = []
        call = record_attention(model, image, layer)
        mixer = call.mixer
        handle = mixer.register_forward_hook(
            lambda *args, made=made: made.append(merge_heads(args[2]))
        )
        model(image)
        handle.remove()
        assert call.grid == grid
        assert call.extra_tokens == (name in ("vit-cls", "castled"))
        tokens = call.q.shape[1]
        mixed = torch.stack(
            [rows_of(call, i).combined.unsqueeze(1) @ call.v for i in range(tokens)], 2
        ).squeeze(3)  # (h, 1, N, e)
        mixed = mixed.transpose(0, 1)
        whole = l2_normalize(mixed) if mixer.norm_output else mixed
        y = whole + mixer.convolve(call.v[None], grid)
        assert_close(merge_heads(y), made[0], atol=1e-5, rtol=1e-5)


def test_a_recording_leaves_no_trace():
    model = build("vit")
    image = draw(1, 3, 32, 32)
    (before,) = model(image)
    call = record_attention(model, image)
    assert not call.mixer._forward_pre_hooks
    assert_close(model(image)[0], before, rtol=0, atol=0)


def test_places_are_found_on_the_grid_behind_the_class_token():
    call = record_attention(build("vit-cls"), draw(1, 3, 32, 48))
    places = [(0.0, 0.0), (0.99, 0.0), (0.0, 0.99), (0.99, 0.99), (0.34, 0.26)]
    assert [call.token_at(x, y) for x, y in places] == [1, 6, 19, 24, 1 + 6 + 2]


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_out_of_range_is_named(layer):
    message = f"layer {layer} does not exist: the backbone has 3 .* 0 to 2"
    with pytest.raises(ValueError, match=message):
        record_attention(build("vit"), draw(1, 3, 32, 32), layer)


def test_models_without_castling_attention_are_refused():
    for model in (
        nn.Conv2d(3, 4, 3),
        CastlingViT(VIT, img_size=32, patch_size=8, attention=dict(type="softmax")),
    ):
        with pytest.raises(ValueError, match="has no castling attention in its"):
            record_attention(model, draw(1, 3, 32, 32))


def test_windows_are_refused():
    from mmpretrain.models.backbones import SwinTransformer

    arch = dict(embed_dims=8, depths=[1, 1], num_heads=[1, 1])
    model = castle(SwinTransformer(arch, img_size=56, out_indices=(1,)))
    with pytest.raises(ValueError, match=r"not attend over the whole .* 4 parts"):
        record_attention(model, draw(1, 3, 56, 56), 0)


def test_a_grid_that_nobody_knows_is_refused():
    model = build("castled")
    model.patch_embed.projection._forward_hooks.clear()
    with pytest.raises(ValueError, match=r"not told the grid of its 25 tokens"):
        record_attention(model, draw(1, 3, 32, 48))
