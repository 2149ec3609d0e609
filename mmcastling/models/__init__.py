"""Castled backbones, and what a config names beside them: necks, heads, classifiers."""

from mmcastling.models.castled import Castled
from mmcastling.models.castling_levit import CastlingLeViT
from mmcastling.models.castling_mvit import CastlingMViT
from mmcastling.models.castling_vit import CastlingViT
from mmcastling.models.distilled_classifier import DistilledClassifier
from mmcastling.models.heads import LeViTHead
from mmcastling.models.simple_feature_pyramid import (
    ChannelLayerNorm,
    SimpleFeaturePyramid,
)
from mmcastling.models.teacher import Teacher

__all__ = [
    "Castled",
    "CastlingLeViT",
    "CastlingMViT",
    "CastlingViT",
    "ChannelLayerNorm",
    "DistilledClassifier",
    "LeViTHead",
    "SimpleFeaturePyramid",
    "Teacher",
]
