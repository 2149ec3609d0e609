"""What the commands in ``tools/`` do, as functions: load, train, evaluate, convert."""

from mmcastling.errors import ConfigError
from mmcastling.run.config import DATA_VARIABLE, check_data, load_config
from mmcastling.run.conversion import ConversionReport, convert
from mmcastling.run.evaluation import Evaluation, evaluate
from mmcastling.run.exported import ExportedEvaluation, evaluate_exported
from mmcastling.run.failures import run_cli
from mmcastling.run.pruning import Pruning
from mmcastling.run.testing import evaluate_file
from mmcastling.run.training import train

__all__ = [
    "DATA_VARIABLE",
    "ConfigError",
    "ConversionReport",
    "Evaluation",
    "ExportedEvaluation",
    "Pruning",
    "check_data",
    "convert",
    "evaluate",
    "evaluate_exported",
    "evaluate_file",
    "load_config",
    "run_cli",
    "train",
]
