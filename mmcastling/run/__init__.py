"""What the commands in ``tools/`` do, as functions: train, test, convert."""

from mmcastling.errors import ConfigError
from mmcastling.run.config import DATA_VARIABLE, check_data, load_config
from mmcastling.run.conversion import convert
from mmcastling.run.failures import run_cli
from mmcastling.run.load import PruningReport, load_pruned_model
from mmcastling.run.testing import (
    Evaluation,
    ExportedEvaluation,
    evaluate,
    evaluate_exported,
)
from mmcastling.run.training import train

__all__ = [
    "DATA_VARIABLE",
    "ConfigError",
    "Evaluation",
    "ExportedEvaluation",
    "PruningReport",
    "check_data",
    "convert",
    "evaluate",
    "evaluate_exported",
    "load_config",
    "load_pruned_model",
    "run_cli",
    "train",
]
