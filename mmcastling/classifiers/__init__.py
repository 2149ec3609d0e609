"""Classifiers that learn from a teacher, and the heads that this needs."""

from mmcastling.classifiers.distilled_classifier import DistilledClassifier
from mmcastling.classifiers.heads import LeViTHead
from mmcastling.classifiers.teacher import Teacher

__all__ = ["DistilledClassifier", "LeViTHead", "Teacher"]
