"""Our MACs against MMEngine's analyser (fvcore's method) where both count an op."""

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from torchvision.models import resnet18

from mmcastling.analysis import count_macs
from mmcastling.models import CastlingViT

COUNTED_BY_BOTH = ("conv", "linear", "matmul", "bmm", "einsum", "addmm")


@pytest.mark.parametrize(
    "model",
    [
        resnet18(),
        CastlingViT("nano", img_size=64, patch_size=8, ffn_conv=3, deploy=True),
    ],
    ids=["resnet18", "castling_vit"],
)
def test_equal_over_the_operators_that_both_count(model):
    x = torch.randn(1, 3, 64, 64)
    analyser = FlopAnalyzer(model.train(False) or model, x)
    analyser.unsupported_ops_warnings(False)
    operators = analyser.by_operator()
    expected = sum(operators[name] for name in COUNTED_BY_BOTH if name in operators)
    assert count_macs(model, x).macs == expected
