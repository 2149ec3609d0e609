"""Every command on images of one channel and of four, as on those of three."""

import cv2
import numpy as np
import pytest

from mmcastling.analysis import count_model_macs, input_channels
from mmcastling.run import convert, evaluate, load_config, train
from mmcastling.run.demo import build_predictor, run_demo
from mmcastling.run.exporting import export
from mmcastling.run.load import build_model
from mmcastling.runtime import ExportedInferencer

CONFIG = """
_base_ = [{base!r}]
model = dict(
    _delete_=True,
    type="ImageClassifier",
    data_preprocessor=dict(mean=[120.0] * {c}, std=[60.0] * {c}, to_rgb=True),
    backbone=dict(
        type="mmcastling.CastlingViT", img_size=32, patch_size=8, in_channels={c},
        arch=dict(embed_dims=24, num_layers=1, num_heads=3, feedforward_channels=24),
    ),
    head=dict(type="VisionTransformerClsHead", num_classes=2, in_channels=24,
              loss=dict(type="CrossEntropyLoss")),
)
pipeline = [
    dict(type="LoadImageFromFile", color_type="unchanged"),
    dict(type="Resize", scale=(32, 32)),
    dict(type="PackInputs"),
]
loader = dict(dataset=dict(data_root={root!r}, pipeline=pipeline))
train_dataloader = val_dataloader = test_dataloader = loader
"""


@pytest.fixture(scope="module", params=[1, 4])
def trained(request, classifier_config, tmp_path_factory):
    """A config, its checkpoint with masks off, a picture, and the channels."""
    channels, folder = request.param, tmp_path_factory.mktemp("channels")
    noise = np.random.default_rng(0)
    for label, level in (("dark", 60), ("light", 180)):
        (folder / "images" / label).mkdir(parents=True)
        for index in range(4):
            shape = (36, 40, channels)
            picture = noise.integers(level - 50, level + 50, shape, np.uint8)
            cv2.imwrite(str(folder / f"images/{label}/{index}.png"), picture)
    config = folder / "config.py"
    facts = dict(base=str(classifier_config), c=channels, root=str(folder))
    config.write_text(CONFIG.format(**facts))
    train(load_config(config, work_dir=str(folder / "work")))
    return config, folder / "work" / "epoch_2.pth", folder, channels


@pytest.mark.slow
@pytest.mark.long
def test_every_command_takes_images_of_any_channels(trained, tmp_path, run_main):
    config, checkpoint, root, channels = trained
    picture = next((root / "images" / "light").iterdir())
    cfg = load_config(config, work_dir=str(tmp_path / "work"))
    metrics = evaluate(cfg, checkpoint).metrics
    convert(cfg, checkpoint, tmp_path / "deployed.pth")
    model = build_model(cfg)
    assert input_channels(model) == channels
    assert count_model_macs(model, (32, 32)).input_shape == (1, channels, 32, 32)

    out = tmp_path / "x.onnx"
    meta = export(cfg, checkpoint, out, image=picture)
    assert meta.channels == channels
    found = ExportedInferencer(out, threads=1).predict(picture)
    assert evaluate(cfg, out).metrics == metrics
    for model in ([str(config), str(checkpoint)], [str(out)]):
        predictor = build_predictor(model)
        sample, _ = predictor(predictor.read(picture))
        assert int(sample.pred_label) == found.label
        report = run_demo(picture, predictor, tmp_path / f"painted{len(model)}")
        assert cv2.imread(str(report.written[0])).std() > 0
    if channels == 1:  # a frame of a video
        sample, _ = predictor(np.full((30, 30, 3), 200, np.uint8))

    for tool, arguments in (
        ("analysis/get_flops.py", (config, "--shape", 32, 32)),
        (
            "analysis/show_attention.py",
            (picture, config, checkpoint, "--point", 8, 8, "--out", tmp_path / "a.png"),
        ),
    ):
        done = run_main(tool, *arguments)
        assert done.returncode == 0, done.stderr


def test_channels_are_those_of_the_first_convolution_of_the_input():
    from mmdet.models import CSPDarknet  # whose first convolution sees 2x2 pixels

    assert input_channels(CSPDarknet(deepen_factor=0.33, widen_factor=0.125)) == 3
