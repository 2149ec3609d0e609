"""Pipelines of a config: carried into an exported file whole, or refused by name."""

import inspect

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import TRANSFORMS, init_default_scope

from mmcastling.export import UnsupportedModelError
from mmcastling.run import ConfigError
from mmcastling.run.pipelines import FilePipeline, runtime_steps
from mmcastling.runtime.preprocess import STEPS

GOOD = dict(
    LoadImageFromFile={},
    Resize=dict(scale=(8, 8)),
    ResizeEdge=dict(scale=8),
    CenterCrop=dict(crop_size=8),
    Pad=dict(size=(8, 8)),
    PackInputs={},
    PackDetInputs={},
    PackSegInputs={},
    LoadAnnotations={},
)
SCOPES = dict(ResizeEdge="mmpretrain", PackDetInputs="mmdet", PackSegInputs="mmseg")


def config(*steps):
    dataset = dict(type="X", pipeline=list(steps))
    return Config(dict(test_dataloader=dict(dataset=dataset)))


@pytest.mark.parametrize("name", GOOD)
def test_every_option_of_a_step_is_heeded_or_refused(name):
    init_default_scope(SCOPES.get(name, "mmpretrain"))
    step = dict(type=name, **GOOD[name])
    known = [kept["type"] for kept in runtime_steps(config(step))]
    assert known == ([name] if name in STEPS else [])
    if name == "LoadAnnotations":  # touches no image, whatever its options
        return
    signature = inspect.signature(TRANSFORMS.get(name).__init__)
    step |= {  # what is not given has its default
        option: parameter.default
        for option, parameter in signature.parameters.items()
        if parameter.default is not parameter.empty and option not in step
    }
    assert list(runtime_steps(config(step))) or name not in STEPS


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (dict(type="CenterCrop", crop_size=9, auto_pad=True), "with auto_pad=True"),
        (dict(type="Pad", size=(9, 9), padding_mode="wrap"), "with padding_mode='wr"),
        (dict(type="Resize", scale=(8, 8), scale_factor=2.0), "with scale_factor=2.0"),
        (dict(type="Resize", scale_factor=2.0), "with scale_factor=2.0"),
        (dict(type="Resize", scale=(8, 8), invented=1), "with invented=1"),
        (
            dict(type="Resize", scale=(8, 8), backend="pillow", interpolation="area"),
            "with interpolation='area'",
        ),
        (dict(type="LoadImageFromFile", imdecode_backend="pillow"), "with imdecode"),
        (dict(type="LoadMultiChannelImageFromFiles"), "does not do: use LoadImage"),
        (dict(type="PackInputs", input_key="depth"), "with input_key='depth'"),
        (dict(type="PackPoseInputs"), "does not do: use"),
        (dict(type="Normalize"), "does not do: use"),
    ],
)
def test_what_the_runtime_does_not_heed_is_refused(step, said):
    with pytest.raises(UnsupportedModelError, match=said):
        list(runtime_steps(config(dict(type="LoadImageFromFile"), step)))


def test_a_config_reads_by_its_own_step_whatever_that_is(tmp_path):
    init_default_scope("mmpretrain")
    np.save(tmp_path / "image.npy", np.full((5, 7), 300, np.uint16))

    @TRANSFORMS.register_module()
    class LoadArray:
        def __call__(self, results):
            return dict(results, img=np.load(results["img_path"]))

    packing = dict(type="PackInputs")
    pipeline = FilePipeline(config(dict(type="LoadArray"), packing))
    image = pipeline.read(tmp_path / "image.npy")
    assert image.max() == 300
    assert pipeline(image)["inputs"].shape == (1, 5, 7)
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ConfigError, match=r"text\.npy \(8 bytes\) cannot be read by"):
        pipeline.read(tmp_path / "text.npy")
    TRANSFORMS._module_dict.pop("LoadArray")
