"""Necks that plain backbones need in front of dense heads."""

from mmcastling.necks.simple_feature_pyramid import (
    ChannelLayerNorm,
    SimpleFeaturePyramid,
)

__all__ = ["ChannelLayerNorm", "SimpleFeaturePyramid"]
