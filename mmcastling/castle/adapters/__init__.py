"""Adapters of the libraries' attentions. Importing them registers them.

No library is imported: classes are named by path, modules are asked for what they hold.
"""

from mmcastling.castle.adapters import (  # noqa: F401
    biased,
    hugging_face,
    hugging_face_layers,
    levit,
    map_attention,
    mvit,
    own,
    self_attention,
    swin,
    timm_attention,
    timm_left_alone,
    timm_windows,
    vit,
)
