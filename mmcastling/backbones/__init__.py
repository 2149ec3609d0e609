"""Castled backbones, registered in mmpretrain's registry and in ours."""

from mmcastling.backbones.castling_vit import CastlingViT

__all__ = ["CastlingViT"]
