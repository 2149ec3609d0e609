"""Castled backbones, registered in mmpretrain's registry and in ours."""

from mmcastling.backbones.castling_levit import CastlingLeViT
from mmcastling.backbones.castling_mvit import CastlingMViT
from mmcastling.backbones.castling_vit import CastlingViT

__all__ = ["CastlingLeViT", "CastlingMViT", "CastlingViT"]
