"""What the tests of the importers share."""

from types import SimpleNamespace

import pytest
import torch
from mmpretrain.registry import MODELS

from mmcastling.checkpoint import load_checkpoint
from mmcastling.weights import import_checkpoint


@pytest.fixture(scope="session")
def randomise():
    """Give every parameter and statistic of a model a value of its own.

    A library's initial biases are zero and its norms one, and a network of those looks
    the same when they are swapped. Batch norms get the statistics of ``images``, since
    with arbitrary ones the signal fades, and all features look the same.
    """

    def run(
        model: torch.nn.Module, seed: int = 0, images: torch.Tensor | None = None
    ) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)

        def noise(tensor, low, high):
            return torch.rand(tensor.shape, generator=generator) * (high - low) + low

        with torch.no_grad():
            for name, value in model.state_dict().items():
                if not value.is_floating_point():
                    continue
                if name.endswith("running_var") or (
                    value.ndim == 1 and name.endswith("weight")
                ):
                    value.copy_(noise(value, 0.8, 1.2))
                elif value.ndim == 1:
                    value.copy_(noise(value, -0.2, 0.2))
                else:
                    fan_in = max(1, value[0].numel())
                    limit = (3 / fan_in) ** 0.5 if value.ndim in (2, 4) else 0.5
                    value.copy_(noise(value, -limit, limit))
        norms = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)
        norms = [module for module in model.modules() if isinstance(module, norms)]
        if images is not None:
            for norm in norms:
                norm.momentum = 1.0  # the statistics are those of this very batch
            model.train()
            with torch.no_grad():
                model(images)
            for norm in norms:  # no division by nothing, which amplifies rounding
                norm.running_var.clamp_(min=0.01)
        model.eval()  # which returns None in mmpretrain's backbones
        return model

    return run


@pytest.fixture
def run_import(tmp_path):
    """Import weights through a file; gives the backbone, its report and the file."""

    def run(weights, family, arch, build=None, **options):
        source, out = tmp_path / "source.pth", tmp_path / "imported.pth"
        if isinstance(weights, dict):
            torch.save(weights, source)
        else:
            source = weights
        report = import_checkpoint(source, out, family, arch, **options)
        checkpoint = load_checkpoint(out)
        cfg = {**report.backbone, **(build or {})}
        backbone = MODELS.build(cfg).eval()
        held = {
            name.removeprefix("backbone."): value
            for name, value in checkpoint["state_dict"].items()
        }
        problems = backbone.load_state_dict(held, strict=False)
        return SimpleNamespace(
            backbone=backbone,
            report=report,
            weights=held,
            missing=problems.missing_keys,
            unexpected=problems.unexpected_keys,
            checkpoint=checkpoint,
            path=out,
        )

    return run


@pytest.fixture(scope="session")
def images():
    """Make images of a size, with shapes in them: tokens of noise look the same."""

    def make(*size: int, channels: int = 3) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        coarse = torch.randn(2, channels, 7, 8, generator=generator)
        shapes = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
        return 2 * shapes + torch.randn(2, channels, *size, generator=generator)

    return make
