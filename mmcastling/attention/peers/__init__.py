"""Softmax and published linear attentions to compare castling with, one per file."""
