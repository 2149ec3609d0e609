"""A castled attention knows the grid of the image that passes, whatever its shape."""

import copy
import functools
import pickle
import threading

import pytest
import timm
import torch
from known_models import build, images, output
from known_timm import TIMM_MODELS, timm_vit
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from mmcastling import castle, switch_to_deploy
from mmcastling.attention import TokenMixer

WIDE, TALL, ODD = (32, 128), (128, 32), (64, 48)  # at patch 16: (2, 8), (8, 2), (4, 3)


def castled(name="timm", **options):
    model = build(name)
    model.eval()  # mmpretrain's returns None
    castle(model, local_conv="grid", mask_threshold=1.0, **options)
    for module in model.modules():  # so that the grid shows in the output
        if isinstance(module, TokenMixer):
            nn.init.normal_(module.local_conv.weight)
    return model


def with_grid(name, size, model):
    """The same weights, told the grid."""
    told = castled(name, grid=(size[0] // 16, size[1] // 16))
    told.load_state_dict(model.state_dict())
    return told


@pytest.fixture
def grids(monkeypatch):
    """The grids that reach convolutions."""
    seen = []
    convolve = TokenMixer.convolve
    monkeypatch.setattr(
        TokenMixer,
        "convolve",
        lambda mixer, v, grid: (seen.append(grid), convolve(mixer, v, grid))[1],
    )
    return seen


@pytest.mark.parametrize("name", ["timm", "timm-deit3", "vit", "dinov2", "mmseg-vit"])
def test_the_grid_is_that_of_the_image_at_changing_sizes(name):
    model = castled(name)
    for size in (WIDE, ODD, TALL, WIDE):
        x = images(size)
        assert_close(output(model, x), output(with_grid(name, size, model), x))


def test_a_wide_image_is_not_taken_for_a_square_one(grids):
    model = castled()
    x = images((128, 512))
    y = model(x)
    assert grids == [(8, 32)] * 2
    assert_close(y, with_grid("timm", (128, 512), model)(x))
    assert (y - with_grid("timm", (256, 256), model)(x)).abs().max() > 1e-3
    assert model(images((208, 336))).isfinite().all()


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("t2t", (64, 96), [(16, 24), (8, 12), (4, 6), (4, 6)]),
        ("tnt", (64, 64), [(4, 4)] * 4),
        ("levit", (64, 64), [(4, 4), (4, 4), (2, 2), (2, 2), (1, 1)]),
        ("torchvision", (64, 64), [(4, 4)] * 2),
        ("eva02", ODD, [(4, 3)] * 2),
        ("sam", ODD, [(3, 3), (4, 3)]),
        ("mmseg-mae", (64, 64), [(4, 4)] * 2),
        ("swin2", (64, 64), None),
    ],
)
def test_every_attention_finds_its_own_grid(name, size, expected, grids):
    assert output(castled(name), images(size)).isfinite().all()
    assert expected is None or grids == expected


def test_models_in_one_process_do_not_meet(grids):
    first = castled()
    second = copy.deepcopy(first)
    third = pickle.loads(pickle.dumps(first))
    last = first.blocks[1].attn
    ways = [(first, WIDE), (second, TALL), (third, ODD)]
    # Each stops after its patch embedding, and goes on when all have got there.
    tokens = [model.patch_embed(images(size)) for model, size in ways]
    assert [t.shape[1:3] for t in tokens] == [(2, 8), (8, 2), (4, 3)]
    for (model, _), t in zip(ways, tokens, strict=True):
        t = t.flatten(1, 2)
        model.blocks[0](torch.cat((t[:, :1], t), 1))
    assert grids == [(2, 8), (8, 2), (4, 3)]
    assert len(first.patch_embed.proj._forward_hooks) == 1
    assert last.grid_source in first.patch_embed.proj._forward_hooks.values()
    assert not any("grid" in name for name in first.state_dict() if "conv" not in name)


def test_threads_do_not_meet(grids):
    model, barrier = castled(), threading.Barrier(2)

    def meet(*_):
        barrier.wait(10)

    block = model.blocks[0].register_forward_pre_hook(meet)
    y, x = {}, {size: images(size) for size in (WIDE, TALL)}

    def run(size):
        with torch.no_grad():
            y[size] = model(x[size])

    threads = [threading.Thread(target=run, args=(size,)) for size in x]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    block.remove()
    for size in x:
        assert_close(y[size], with_grid("timm", size, model)(x[size]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_that_run_again_in_the_backward_pass_find_their_grid(reentrant):
    model, again = castled(), castled()
    again.load_state_dict(model.state_dict())
    for block in again.blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=reentrant
        )
    for net in (model, again):  # crops of two sizes, then one backward pass
        (
            net(images(WIDE)).square().mean() + net(images(ODD)).square().mean()
        ).backward()
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert_close(p.grad, q.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_grids_that_cannot_be_told_apart_are_refused_there(reentrant):
    model, again = castled(), castled()
    again.load_state_dict(model.state_dict())
    for block in again.blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=reentrant
        )
    loss = again(images(WIDE)).square().mean() + again(images(TALL)).square().mean()
    with pytest.raises(
        ValueError, match=r"16 tokens, which were on grids of \[\(2, 8\)"
    ):
        loss.backward()
    again.zero_grad()
    with torch.no_grad():
        again(images(TALL))
    for net in (model, again):  # one after the other
        for size in (WIDE, TALL):
            net(images(size)).square().mean().backward()
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert_close(p.grad, q.grad)


def test_all_class_tokens_of_a_parameter_are_off_the_grid():
    model = timm.create_model("pit_ti_distilled_224", depth=(1, 1, 1)).eval()
    assert model.cls_token.shape[1] == 2
    castled = castle(copy.deepcopy(model), type="softmax", local_conv=None)
    x = images((224, 224))
    for y, expected in zip(castled(x), model(x), strict=True):
        assert_close(y, expected, atol=1e-5, rtol=1e-5)
    for y in castle(model)(x):
        assert y.shape == expected.shape and y.isfinite().all()


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.long)])
def test_compiled(dynamic):
    torch._dynamo.reset()
    model = castled()
    compiled = torch.compile(model, backend="eager", dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        for size in (WIDE, ODD, TALL):
            x = images(size)
            assert_close(compiled(x), model(x))
            model(images((64, 64)))  # and not compiled, in between


@pytest.mark.long
@pytest.mark.parametrize("deploy", [False, True])
def test_compiled_by_block(deploy):
    torch._dynamo.reset()
    model = castled()
    model = switch_to_deploy(model) if deploy else model
    compiled = copy.deepcopy(model)
    for block in compiled.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        for size in (WIDE, ODD, TALL):
            assert_close(compiled(images(size)), model(images(size)))


def test_exported_and_traced():
    model = switch_to_deploy(castled())
    dims = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    x = images(WIDE)
    with torch.no_grad():
        found = torch.export.export(model, (x,), dynamic_shapes=(dims,), strict=False)
        traced = torch.jit.trace(model, x, check_trace=False)
        assert_close(traced(x), model(x))
        assert_close(found.module()(x), model(x))
        assert_close(traced(images((64, 128))), model(images((64, 128))))


def test_features_are_extracted_at_any_size():
    model = castled("torchvision")
    node = "encoder.layers.encoder_layer_1.self_attention"
    extract = create_feature_extractor(model, [node])
    model(images((64, 64), seed=1))
    assert extract(images((64, 64)))[node][0].isfinite().all()


def test_where_the_grid_cannot_be_known_it_must_be_given():
    model = castle(timm_vit(patch_drop_rate=0.5), local_conv="grid").eval()
    assert model(images(WIDE)).isfinite().all()  # nothing is dropped in evaluation
    message = r"the grid of 9 tokens, 1 of .* is not known \(the map .* had \(2, 8\)\)"
    with pytest.raises(ValueError, match=message):
        model.train()(images(WIDE))
    part = copy.deepcopy(model.blocks)
    with pytest.raises(ValueError, match=r"say castle\(model, grid=\(H, W\)\)"):
        part(torch.randn(1, 17, 24))
    model = castled(grid=(6, 3))
    assert output(model, images((96, 48))).isfinite().all()
    with pytest.raises(ValueError, match=r"grid=\(6, 3\), but there are 17 tokens"):
        model(images((64, 64)))


@pytest.mark.long
@pytest.mark.parametrize(
    "name", sorted(TIMM_MODELS.keys() - {"timm-hiera", "timm-naflex"})
)
def test_every_family_of_timm_tells_its_grid(name, grids):
    model = castled(name)
    for size in TIMM_MODELS[name][1]:
        assert output(model, images(size)).isfinite().all()
    assert grids


def test_tokens_that_lie_in_no_order_of_a_grid_have_no_convolution_on_it():
    with pytest.raises(ValueError, match="not in the order of a grid"):
        castled("timm-hiera")
