"""``init_cfg=dict(type='Pretrained')`` of a backbone is loud about what it lacks."""

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.runner.checkpoint import CheckpointLoader
from mmpretrain.models.backbones import LeViT, VisionTransformer

import mmcastling.models  # noqa: F401
from mmcastling.checkpoint import CheckpointError
from mmcastling.deploy import deploy_checkpoint
from mmcastling.models import CastlingLeViT, CastlingMViT, CastlingViT
from mmcastling.models.pretrained import check_start, read_checkpoint
from mmcastling.verbs import switch_to_deploy

NANO = dict(embed_dims=128, num_layers=4, num_heads=4, feedforward_channels=512)


@pytest.fixture
def save(tmp_path):
    """Save weights, with a prefix; gives the path."""

    def run(weights, prefix=""):
        path = tmp_path / "weights.pth"
        state = {prefix + name: value for name, value in weights.items()}
        torch.save({"state_dict": state}, path)
        return str(path)

    return run


def pretrained(path, **options):
    return dict(type="Pretrained", checkpoint=path, **options)


@pytest.mark.parametrize("as_list", [False, True])
def test_weights_that_fit_are_loaded(as_list, save):
    source = VisionTransformer(arch=NANO)
    source.init_weights()
    path = save(source.state_dict(), "backbone.")
    cfg = pretrained(path, prefix="backbone.")
    if as_list:
        cfg = [dict(type="Constant", layer="Linear", val=0.5), cfg]
    model = CastlingViT("nano", init_cfg=cfg)
    model.init_weights()
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("as_list", [False, True])
def test_names_of_another_library_are_an_error(as_list, save):
    timm_models = pytest.importorskip("timm.models.vision_transformer")
    source = timm_models.VisionTransformer(embed_dim=128, depth=4, num_heads=4)
    cfg = pretrained(save(source.state_dict()))
    model = CastlingViT("nano", init_cfg=[cfg] if as_list else cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        model.init_weights()
    # cls_token and pos_embed have the same names in both.
    message = str(caught.value)
    own = dict(model.named_parameters())
    share = (own["cls_token"].numel() + own["pos_embed"].numel()) / sum(
        value.numel() for value in own.values()
    )
    assert f"has only 2 of its {len(own)} parameters ({share:.1%} of" in message
    assert "no patch_embed.projection.weight" in message
    assert "import_vit.py" in message
    assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items())


def test_another_width_is_an_error_that_names_shapes(save):
    path = save(CastlingViT("tiny").state_dict())
    with pytest.raises(CheckpointError, match=r"\(1, 1, 192\), expected \(1, 1, 128\)"):
        CastlingViT("nano", init_cfg=pretrained(path)).init_weights()


def test_another_prefix_is_an_error(save):
    path = save(CastlingViT("nano").state_dict(), "encoder.")
    init_cfg = pretrained(path, prefix="backbone.")
    with pytest.raises(
        CheckpointError, match=r"under the prefix 'backbone\.'.*encoder"
    ):
        CastlingViT("nano", init_cfg=init_cfg).init_weights()


def test_published_levit_weights_are_those_of_the_softmax_twin(save):
    weights = LeViT("128s").state_dict()
    model = CastlingLeViT(
        "128s",
        img_size=256,  # so that tables of biases are resized
        attention=dict(type="softmax"),
        init_cfg=pretrained(save(weights)),
    )
    model.init_weights()
    own = model.state_dict()
    for name in ("stages.2.0.proj.1.linear.weight", "stages.1.2.block.qkv.bn.bias"):
        assert torch.equal(own[name], weights[name])


@pytest.mark.parametrize("arch", ["128s", "128", "192", "256", "384"])
def test_published_levit_weights_are_refused_by_the_castled_network(arch, save):
    weights = LeViT(arch).state_dict()
    model = CastlingLeViT(arch, init_cfg=pretrained(save(weights)))
    own = dict(model.named_parameters())
    fits = [n for n, p in own.items() if n in weights and weights[n].shape == p.shape]
    held = sum(own[name].numel() for name in fits)
    assert held > sum(p.numel() for p in own.values()) / 2  # its MLPs
    message = r"of its attentions' \d+ parameters.*qkv\.linear.*import_levit"
    with pytest.raises(CheckpointError, match=message):
        model.init_weights()


@pytest.mark.parametrize("kind", ["softmax", "performer"])
def test_mlps_without_attentions_are_an_error_in_every_backbone(kind, save):
    attention = dict(type=kind)
    for backbone in (CastlingViT("nano"), CastlingMViT("tiny", attention=attention)):
        weights = {n: v for n, v in backbone.state_dict().items() if "attn" not in n}
        path = save(weights)
        arch = "nano" if isinstance(backbone, CastlingViT) else "tiny"
        model = type(backbone)(arch, attention=attention, init_cfg=pretrained(path))
        with pytest.raises(CheckpointError, match=r"only 0 of its attentions' \d+ par"):
            model.init_weights()


def test_just_half_is_enough(save):
    model = CastlingMViT("tiny")
    # The attentions whole, so that they are not what is missing.
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    sizes = dict(sorted(sizes.items(), key=lambda item: ".attn." not in item[0]))
    total, held, names = sum(sizes.values()), 0, []
    for name, size in sizes.items():
        names.append(name)
        held += size
        if held * 2 >= total:
            break
    weights = {name: model.state_dict()[name] for name in names}
    path = save(weights)
    CastlingMViT("tiny", init_cfg=pretrained(path)).init_weights()
    weights.popitem()
    path = save(weights)
    with pytest.raises(CheckpointError, match="at least 50%"):
        CastlingMViT("tiny", init_cfg=pretrained(path)).init_weights()


@pytest.mark.parametrize("with_cls_token", [True, False])
@pytest.mark.parametrize("held", [True, False], ids=["held", "not held"])
def test_positions_of_another_image_size_and_class_token(held, with_cls_token, save):
    token = dict(out_type="featmap", with_cls_token=held)
    source = CastlingViT("nano", **token)
    source.init_weights()
    model = CastlingViT(
        "nano",
        img_size=(96, 128),
        out_type="featmap",
        with_cls_token=with_cls_token,
        init_cfg=pretrained(save(source.state_dict())),
    )
    model.init_weights()
    grid = source.pos_embed[:, int(held) :].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, (6, 8), mode="bicubic")
    extra = int(with_cls_token)
    torch.testing.assert_close(
        model.pos_embed[:, extra:], resized.flatten(2).transpose(1, 2)
    )
    if with_cls_token:
        own = source.pos_embed[:, :1] if held else torch.zeros(1, 1, 128)
        torch.testing.assert_close(model.pos_embed[:, :1], own)


def test_positions_of_no_square_are_an_error(save):
    path = save(CastlingViT("nano", img_size=(96, 160)).state_dict())
    model = CastlingViT("nano", img_size=128, init_cfg=pretrained(path))
    with pytest.raises(CheckpointError, match=r"cannot be resized.*--img-size"):
        model.init_weights()


def test_nested_weights_are_an_error(save, tmp_path):
    torch.save({"model": CastlingViT("nano").state_dict()}, tmp_path / "nested.pth")
    model = CastlingViT("nano", init_cfg=pretrained(str(tmp_path / "nested.pth")))
    with pytest.raises(CheckpointError, match=r"nested\.pth: .*no weights.*import_vit"):
        model.init_weights()


def test_inside_another_model(save):
    class Detector(BaseModule):
        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone

    path = save(CastlingViT("tiny").state_dict(), "backbone.")
    model = CastlingViT("nano", init_cfg=pretrained(path, prefix="backbone"))
    with pytest.raises(CheckpointError, match="init_cfg of CastlingViT"):
        Detector(model).init_weights()


# -- load_from -------------------------------------------------------------------------


class Detector(BaseModule):
    """A backbone, and a head of so many classes."""

    def __init__(self, backbone, classes=3):
        super().__init__()
        self.backbone, self.head = backbone, torch.nn.Linear(128, classes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CastlingViT("nano", layer_scale_init_value=0.5),
        lambda: CastlingLeViT("128s", attention=dict(type="softmax")),
    ],
)
def test_training_starts_neither_from_deployed_nor_from_other_weights(make):
    model = Detector(make())
    checkpoint = deploy_checkpoint(switch_to_deploy(model), {})
    with pytest.raises(CheckpointError, match=r"a\.pth has been deployed"):
        check_start(model, checkpoint, "a.pth")
    other = Detector(CastlingMViT("tiny"))
    for checkpoint in (
        dict(state_dict=other.state_dict()),
        dict(state_dict=model.backbone.state_dict()),  # without the prefix
        dict(state_dict={"head.weight": model.head.weight}),
    ):
        with pytest.raises(CheckpointError, match=r"load_from a\.pth has only"):
            check_start(model, checkpoint, "a.pth")


def test_it_starts_from_a_model_of_other_classes_and_from_a_softmax_twin():
    model = Detector(CastlingViT("nano"))
    twin = Detector(CastlingViT("nano", attention=dict(type="softmax")), classes=80)
    check_start(model, dict(state_dict=twin.state_dict()), "a.pth")
    check_start(model.backbone, dict(state_dict=twin.backbone.state_dict()), "a.pth")


def test_a_deployed_file_is_no_init_cfg_either(tmp_path):
    model = CastlingViT("nano", layer_scale_init_value=0.5)
    path = tmp_path / "a.pth"
    torch.save(deploy_checkpoint(switch_to_deploy(model), {}), path)
    with pytest.raises(CheckpointError, match="has been deployed"):
        CastlingViT("nano", init_cfg=pretrained(str(path))).init_weights()


def test_a_start_from_an_address_is_checked_too(tmp_path, monkeypatch, attack):
    loaders = []

    def load(source, *_):
        loaders.append(source)
        return dict(state_dict={})

    monkeypatch.setattr(CheckpointLoader, "load_checkpoint", load)
    assert read_checkpoint("https://host/a.pth") == dict(state_dict={})
    assert loaders == ["https://host/a.pth"]
    with pytest.raises(CheckpointError, match="is refused"):
        read_checkpoint(str(attack.path))
