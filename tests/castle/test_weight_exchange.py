"""castle(VisionTransformer) and CastlingViT are one network: weights go both ways."""

import pytest
import torch
from forms import RELEASED
from mmpretrain.models.backbones import VisionTransformer
from torch.testing import assert_close

from mmcastling import castle
from mmcastling.castle import RECOMMENDED
from mmcastling.checkpoint import load_checkpoint
from mmcastling.models import CastlingViT
from mmcastling.weights.importing import import_checkpoint

ARCH = dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=48)

AUTHORS = dict(RELEASED, local_conv="token", mask_threshold="1/N")


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def randomised(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    return model


@pytest.mark.parametrize("kind", ["castling", "performer", "focused"])
def test_mmpretrains_transformer_and_ours_exchange_weights(kind):
    spec = dict(type=kind, local_conv="token")
    spec |= RECOMMENDED if kind == "castling" else {}
    options = dict(img_size=64, layer_scale_init_value=0.5)
    theirs = randomised(castle(VisionTransformer(ARCH, **options), **spec))
    ours = CastlingViT(ARCH, attention=spec, **options)
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours.eval()(images()), theirs(images()))
    again = castle(VisionTransformer(ARCH, **options), **spec)
    again.load_state_dict(randomised(ours).state_dict())
    again.eval()
    assert_close(again(images()), ours(images()))


def test_timms_transformer_becomes_ours_through_the_importer(tmp_path):
    timm_models = pytest.importorskip("timm.models.vision_transformer")
    theirs = timm_models.VisionTransformer(
        img_size=64, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, init_values=0.5
    )
    theirs = randomised(castle(theirs, **AUTHORS))
    source, destination = tmp_path / "timm.pth", tmp_path / "ours.pth"
    torch.save(theirs.state_dict(), source)
    report = import_checkpoint(source, destination, "vit", ARCH)
    assert not report.new
    ours = CastlingViT(
        ARCH,
        img_size=64,
        layer_scale_init_value=0.5,
        attention=AUTHORS,
    )
    weights = load_checkpoint(destination)["state_dict"]
    ours.load_state_dict({k.removeprefix("backbone."): v for k, v in weights.items()})
    (cls_token,) = ours.eval()(images())
    assert_close(cls_token, theirs.forward_features(images())[:, 0])
