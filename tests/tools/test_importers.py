"""The importers as commands, and their files in the configs of detectors."""

import re

import pytest
import timm
import torch
from mmengine.registry import MODELS

from mmcastling.checkpoint import load_checkpoint
from mmcastling.run import load_config
from mmcastling.weights import FAMILIES
from mmcastling.weights.import_cli import make_parser

IMPORTERS = "model_converters/import_{}.py"


@pytest.fixture
def timm_vit(tmp_path):
    """A checkpoint of the demo's size under timm's names."""
    model = timm.models.vision_transformer.VisionTransformer(
        embed_dim=128, depth=4, num_heads=4, num_classes=5
    )
    torch.save({"model": model.state_dict()}, tmp_path / "timm.pth")
    return tmp_path / "timm.pth"


def test_import_vit_reports_and_says_how_to_use_it(run_main, timm_vit, tmp_path):
    out = tmp_path / "imported.pth"
    arguments = ("--arch", "nano", "--img-size", "128", "192")
    done = run_main(IMPORTERS.format("vit"), timm_vit, out, *arguments)
    assert done.returncode == 0, done.stderr
    for text in (
        "names of timm, DeiT, MAE or DINO",
        "resized from 14x14 to 8x12: pos_embed",
        "layers.*.attn.mixer.local_conv.weight (4)",
        "classifier: head.weight, head.bias",
    ):
        assert text in done.stdout
    assert printed_config(done)["backbone"]["img_size"] == (128, 192)


def printed_config(done):
    """The config that the command advises."""
    line = done.stdout.split("in a config:")[1].strip()
    return eval(f"dict({line})", {"dict": dict})


def test_the_printed_config_builds_and_loads(run_main, timm_vit, tmp_path):
    out = tmp_path / "imported.pth"
    done = run_main(IMPORTERS.format("vit"), timm_vit, out, "--arch", "nano")
    cfg = printed_config(done)
    backbone = MODELS.build(cfg["backbone"])
    backbone.init_weights()
    weights = load_checkpoint(out)["state_dict"]
    own = backbone.state_dict()
    for name, value in weights.items():
        assert torch.equal(own[name.removeprefix("backbone.")], value), name
    theirs = torch.load(timm_vit)["model"]["blocks.3.mlp.fc2.weight"]
    assert torch.equal(own["layers.3.ffn.layers.1.weight"], theirs)


@pytest.mark.slow
def test_a_detector_starts_from_imported_weights(
    run_main, timm_vit, detector_config, tmp_path
):
    """The demo's detector has no class token and another image size."""
    out = tmp_path / "imported.pth"
    done = run_main(IMPORTERS.format("vit"), timm_vit, out, "--arch", "nano")
    assert done.returncode == 0, done.stderr
    cfg = load_config(detector_config)
    cfg.model.backbone.update(
        arch="nano",
        stem="patch",
        patch_size=16,
        init_cfg=dict(type="Pretrained", checkpoint=str(out), prefix="backbone."),
    )
    model = MODELS.build(cfg.model)
    model.init_weights()
    held = load_checkpoint(out)["state_dict"]
    own = model.state_dict()
    assert torch.equal(
        own["backbone.layers.2.attn.qkv.weight"],
        held["backbone.layers.2.attn.qkv.weight"],
    )
    assert own["backbone.pos_embed"].shape[1] == 8 * 8
    # A file that was not imported stops the training before it begins.
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(timm_vit)["model"], bare)
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(bare))
    cfg.dump(tmp_path / "config.py")
    done = run_main("train.py", tmp_path / "config.py", "--work-dir", tmp_path / "w")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "init_cfg of CastlingViT" in done.stderr


@pytest.mark.parametrize(
    ("family", "arch", "name"),
    [("levit", "128s", "levit_128s"), ("mvit", "tiny", "mvitv2_tiny")],
)
def test_the_pyramids_are_imported(family, arch, name, run_main, tmp_path):
    torch.save(timm.create_model(name).state_dict(), tmp_path / "timm.pth")
    out = tmp_path / "out.pth"
    tool = IMPORTERS.format(family)
    done = run_main(tool, tmp_path / "timm.pth", out, "--arch", arch)
    assert done.returncode == 0, done.stderr
    assert "with the names of timm" in done.stdout
    assert "which linear attention cannot have" in done.stdout
    cfg = printed_config(done)
    MODELS.build(cfg["backbone"]).init_weights()  # which raises if less than half fits


def test_errors_are_one_line(run_main, timm_vit, attack, tmp_path):
    tool, out = IMPORTERS.format("vit"), tmp_path / "out.pth"
    for arguments, part in (
        ((timm_vit, out, "--arch", "small"), "They fit arch 'nano'"),
        ((timm_vit, out, "--arch", "enormous"), "arch 'enormous' is not known"),
        ((timm_vit, timm_vit, "--arch", "nano"), "is the source"),
        ((timm_vit, tmp_path / "no/out.pth", "--arch", "nano"), "does not exist"),
        ((timm_vit, out, "--arch", "nano", "--img-size", "8"), "smaller than a token"),
        ((attack.path, out, "--arch", "nano"), "refused: it asks to run code"),
        ((timm_vit, out, "--arch", "nano", "--in-channels", "1"), "of 3 channels"),
    ):
        done = run_main(tool, *arguments)
        assert done.returncode == 1, (arguments, done.stderr)
        assert done.stderr.startswith("error: ")
        assert part in done.stderr
        assert done.stderr.count("\n") == 1
    assert not out.exists()
    assert not attack.trace.exists()
    done = run_main(tool, timm_vit, out)
    assert done.returncode == 2
    assert "--arch" in done.stderr


def test_the_commands_of_the_documentation_are_commands(root):
    text = (root / "docs" / "pretrained.md").read_text()
    commands = re.findall(r"python tools/(\S+/import_(\w+)\.py) ([^`\n]+)", text)
    assert {family for _, family, _ in commands} == set(FAMILIES)
    for tool, family, arguments in commands:
        assert (root / "tools" / tool).exists()
        args = make_parser(FAMILIES[family], "").parse_args(arguments.split())
        assert args.arch in FAMILIES[family].backbone.arch_zoo
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (root / "docs" / target).exists()
