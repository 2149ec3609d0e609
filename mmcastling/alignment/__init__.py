"""Teach a castled network what its softmax original knows, from pictures alone.

    student = castle(copy.deepcopy(teacher))
    align(student, teacher, images)

First each castled attention learns to give what the softmax one gives, then the whole
network the features that the next part reads.
"""

from mmcastling.alignment.aligning import align
from mmcastling.alignment.pairs import (
    AlignError,
    attention_errors,
    attention_pairs,
    feature_similarity,
)
from mmcastling.alignment.pictures import PictureBatches
from mmcastling.alignment.scanning import scan

__all__ = [
    "AlignError",
    "PictureBatches",
    "align",
    "attention_errors",
    "attention_pairs",
    "feature_similarity",
    "scan",
]
