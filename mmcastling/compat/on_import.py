"""What OpenMMLab and timm learn of this package when they are imported.

``import mmcastling`` needs torch alone. Where one of the libraries below has been
imported, or is imported later, the function beside it is called with the module. The
two finders of :func:`install` see to the latter, answer for ``mmcv._ext`` where nothing
else does, and say where a module of ours has moved. Needs the standard library alone.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

AFTER_IMPORT = {
    "mmengine.registry.registry": "load_second_half_on_first_lookup",
    "mmengine.config.utils": "name_packages",
    "mmengine.infer.infer": "name_models_in_inferencers",
    "mmengine.logging": "drop_debug_messages",
    "mmengine.logging.history_buffer": "allow_history_in_checkpoints",
    "mmdet.models.detectors.base": "keep_images_at_own_size",
    "mmengine.runner.checkpoint": "keep_metadata_in_mmengine",
    "mmpretrain.apis.model": "name_classifiers",
    "mmpretrain.utils.dependency": "leave_out_what_transformers_5_breaks",
    "ptflops.pytorch_ops": "name_layers_in_counters",
    "thop.profile": "name_layers_in_counters",
    "timm.models": "name_timm_models",
    "timm.models._helpers": "keep_metadata_in_timm",
    "timm.utils.model_ema": "let_averages_follow",
    "torch.optim.swa_utils": "let_averages_follow",
    "transformers.utils": "drop_warnings_for_torchao",
}
"""Functions of :mod:`mmcastling.compat.registrations`, by the module they are given."""

MOVED = {
    "mmcastling.analysis.figures": "mmcastling.show.figures",
    "mmcastling.analysis.parts": "mmcastling.analysis.timing",
    "mmcastling.analysis.run_log": "mmcastling.show.run_log",
    "mmcastling.attention.baselines": "mmcastling.attention.peers",
    "mmcastling.attention.block": "mmcastling.attention.attention",
    "mmcastling.attention.linear": "mmcastling.attention.fast",
    "mmcastling.backbones": "mmcastling.models",
    "mmcastling.castle.attention": "mmcastling.castle.castled_attention",
    "mmcastling.castle.registry": "mmcastling.castle.adapter_registry",
    "mmcastling.classifiers": "mmcastling.models",
    "mmcastling.datasets": "mmcastling.data",
    "mmcastling.deploy.checkpoint": "mmcastling.deploy.deployed_checkpoint",
    "mmcastling.deploy.config": "mmcastling.run.conversion",
    "mmcastling.deploy.export": "mmcastling.export",
    "mmcastling.deploy.runtime": "mmcastling.runtime",
    "mmcastling.engine": "mmcastling.run (its errors: mmcastling.errors)",
    "mmcastling.hooks": "mmcastling.train (what mends MMEngine: mmcastling.compat)",
    "mmcastling.importers": "mmcastling.weights",
    "mmcastling.model_index": "mmcastling.compat.model_index",
    "mmcastling.necks": "mmcastling.models",
    "mmcastling.optim": "mmcastling.train",
    "mmcastling.protocol": "mmcastling.verbs",
    "mmcastling.timm_models": "mmcastling.models.timm_models",
}
"""Former names of packages and modules."""


def _tell(module: ModuleType) -> None:
    registrations = importlib.import_module("mmcastling.compat.registrations")
    getattr(registrations, AFTER_IMPORT[module.__name__])(module)


class _AfterImport(MetaPathFinder):
    """Before all other finders: lets a module of the table be told once it is there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        spec = PathFinder.find_spec(name, path) if name in AFTER_IMPORT else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            _tell(module)

        spec.loader.exec_module = execute_and_tell
        return spec


class _NotFound(MetaPathFinder):
    """After all other finders: a stand-in for ``mmcv._ext``, and where ours went."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name == "mmcv._ext":
            return importlib.import_module("mmcastling.compat.mmcv_ext").stand_in_spec()
        if name in MOVED:
            raise ModuleNotFoundError(
                f"{name} has moved: since mmcastling 0.2.0 it is {MOVED[name]}",
                name=name,
            )


def install() -> None:
    """Begin to answer imports, and tell the libraries that are there already."""
    sys.meta_path.insert(0, _AfterImport())
    sys.meta_path.append(_NotFound())
    for name in AFTER_IMPORT:
        if (module := sys.modules.get(name)) is not None:
            _tell(module)
