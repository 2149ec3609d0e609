"""Options that make a detector's Castling-LeViT two stages of a block each."""

TWO_STAGES = {  # maps of strides 8 to 32 with these channels
    "model.backbone.arch": dict(
        embed_dims=[32, 64],
        key_dims=[16, 16],
        num_heads=[1, 2],
        depths=[1, 1],
        _delete_=True,
    ),
    "model.backbone.out_indices": (0, 1),
    "model.neck.in_channels": [16, 32, 64],
}
