"""What the commands in ``tools/`` do, as functions: load, train, evaluate, convert."""

from mmcastling.engine.config import DATA_VARIABLE, check_data, load_config
from mmcastling.engine.conversion import ConversionReport, convert
from mmcastling.engine.errors import ConfigError, run_cli
from mmcastling.engine.evaluation import Evaluation, evaluate
from mmcastling.engine.exported import ExportedEvaluation, evaluate_exported
from mmcastling.engine.pruning import Pruning
from mmcastling.engine.testing import evaluate_file
from mmcastling.engine.training import train

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
