"""tools/analysis/get_flops.py: parameters and MACs of a config's graphs."""

import json

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmcastling.analysis import count_model_macs
from mmcastling.verbs import switch_to_deploy

TOOL = "analysis/get_flops.py"
IMPORTS = 'custom_imports = dict(imports=["mmcastling"], allow_failed_imports=False)\n'
BACKBONE = IMPORTS + (
    'model = dict(type="mmcastling.CastlingViT", patch_size=8, img_size=32, '
    "arch=dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=40), "
    "with_cls_token=False, out_type='featmap', ffn_conv=3, "
    'attention=dict(local_conv="token", mask_threshold="4/N"))\n'
)


@pytest.fixture
def count(run_main, tmp_path):
    """Run the tool on a config's text or path; returns its JSON."""

    def run(config, *arguments, height=32, width=48):
        if "\n" in str(config):
            path = tmp_path / "made_up.py"
            path.write_text(config)
        else:
            path = config
        out = tmp_path / "counts.json"
        arguments = ["--shape", height, width, "--json", out, *arguments]
        done = run_main(TOOL, path, *arguments)
        assert done.returncode in (0, None), done.stderr
        assert [p.name for p in tmp_path.glob("*.partial")] == []
        return json.loads(out.read_text()), done.stdout

    return run


def test_totals_are_those_counted_by_hand(count):
    n, c, d, f, layers = 4 * 6, 24, 8, 40, 2
    shared = n * 3 * 8 * 8 * c  # patches
    shared += layers * (3 * n * c * c + n * c * c)  # qkv, proj
    shared += layers * (2 * n * c * f + 9 * n * f)  # MLP and its convolution
    softmax = layers * 2 * n * n * c  # q k and P v, all heads
    linear = layers * (2 * n * c * d + 9 * n * c)  # k v, q (k v), 9 taps
    result, output = count(BACKBONE)
    macs = {name: graph["macs"] for name, graph in result["graphs"].items()}
    assert macs == {
        "training graph": shared + linear + softmax,
        "deployed graph": shared + linear,
        "softmax twin": shared + softmax,
    }
    saved = softmax / (shared + linear + softmax)
    assert f"saves {saved:.1%}" in output


def test_parameters_and_parts(count):
    result, output = count(BACKBONE)
    for graph in result["graphs"].values():
        assert sum(graph["by_module"].values()) == graph["macs"]
        assert list(graph["by_module"]) == ["patch_embed", "layers"]
    params = [graph["params"] for graph in result["graphs"].values()]
    assert params[0] == params[1] == params[2] + 2 * 9 * 3
    assert (result["shape"], result["config"]) == ([32, 48], "made_up.py")
    assert all(word in output for word in ("patch_embed", "layers", "parameters"))


def test_config_options_reach_the_model(count):
    plain, _ = count(BACKBONE)
    changed, _ = count(BACKBONE, "--cfg-options", "model.ffn_conv=0")
    for name, graph in changed["graphs"].items():
        assert plain["graphs"][name]["macs"] - graph["macs"] == 2 * 9 * 24 * 40


def test_deployed_config_has_no_training_graph(count):
    result, output = count(BACKBONE, "--cfg-options", "model.deploy=True")
    assert list(result["graphs"]) == ["as built", "softmax twin"]
    assert "saves" not in output


def test_attention_per_scale_has_a_twin(count):
    arch = "dict(embed_dims=8, num_layers=2, num_heads=1, downscale_indices=[1])"
    config = IMPORTS + (
        f'model = dict(type="mmcastling.CastlingMViT", arch={arch}, img_size=32,'
        ' attention=[dict(type="linear_angular"), dict(mask_threshold=0.1)])\n'
    )
    result, _ = count(config)
    twin = config.replace("[dict(type=", "dict(type=").split("angular")[0]
    twin = twin.replace("linear_", 'softmax"))\n')
    expected, _ = count(twin)
    assert result["graphs"]["softmax twin"] == expected["graphs"]["as built"]


def test_classifier_config_costs_what_is_published(count, root):
    result, _ = count(root / "configs/castling_tiny_in1k.py", height=224, width=224)
    deployed = result["graphs"]["deployed graph"]
    assert deployed["macs"] / 1e9 == pytest.approx(1.18, rel=0.01)
    assert deployed["by_module"]["head"] == 192 * 1000


def test_detector_counts_equal_those_of_the_real_model(count, root):
    path = root / "configs/mask_rcnn_castling_nano_nuclei.py"
    result, _ = count(path, height=64, width=96)
    cfg = Config.fromfile(path)
    init_default_scope("mmdet")
    detector = MODELS.build(cfg.model)
    for name in ("training graph", "deployed graph"):
        real = count_model_macs(detector, (64, 96))
        assert result["graphs"][name]["macs"] == real.macs
        assert result["graphs"][name]["params"] == real.params
        assert result["graphs"][name]["by_module"] == real.by_module
        detector = switch_to_deploy(detector)


@pytest.mark.slow
def test_two_stage_detector_that_is_not_castled(count, root):
    options = ["model.test_cfg.rpn.max_per_img=9", "model.test_cfg.rcnn.max_per_img=2"]
    path = root / "configs/mask_rcnn_swin_t_coco.py"
    result, _ = count(path, "--cfg-options", *options, height=64, width=96)
    cfg = Config.fromfile(path)
    cfg.model.test_cfg.rpn.max_per_img, cfg.model.test_cfg.rcnn.max_per_img = 9, 2
    init_default_scope("mmdet")
    real = count_model_macs(MODELS.build(cfg.model), (64, 96))
    assert result["graphs"]["as built"]["by_module"] == real.by_module


def test_one_stage_detector(count, root):
    path = root / "configs/retinanet_castling_levit_256_coco.py"
    result, _ = count(path, height=64, width=64)
    for graph in result["graphs"].values():
        assert set(graph["by_module"]) == {"backbone", "neck", "bbox_head"}


def test_segmentor(count):
    config = IMPORTS + (
        'default_scope = "mmseg"\n'
        + BACKBONE.split("\n")[1].replace("model", "backbone")
        + "\n"
        'model = dict(type="EncoderDecoder", backbone=backbone, decode_head=dict('
        'type="FCNHead", in_channels=24, channels=8, num_convs=1, concat_input=False, '
        "num_classes=3, norm_cfg=None))\n"
    )
    result, _ = count(config)
    alone, _ = count(BACKBONE)
    for name, graph in result["graphs"].items():
        assert graph["by_module"]["backbone"] == alone["graphs"][name]["macs"]
        head = 24 * (9 * 24 * 8 + 8 * 3)  # at 4x6 tokens
        assert graph["by_module"]["decode_head"] == head


def test_a_model_that_is_not_castled_is_counted_as_built(count):
    config = 'default_scope = "mmpretrain"\nmodel = dict(type="ResNet", depth=18)\n'
    result, output = count(config, height=224, width=224)
    assert list(result["graphs"]) == ["as built"] and "saves" not in output
    assert result["graphs"]["as built"]["macs"] == pytest.approx(1.81e9, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", 0, 32], "--shape 0 32: give positive sizes"),
        (["--shape", 32], "expected 2 arguments"),
        (["--shape", 32, 32, "--json", "no/such/x.json"], "does not exist or is read"),
        (["--shape", 4, 32], "4x32 pixels is smaller than a patch"),
        (["--shape", 32, 32, "--cfg-options", "model.ffn_conv=2"], "ffn_conv 2 must"),
    ],
)
def test_wrong_use_is_named_without_a_traceback(run_main, tmp_path, arguments, message):
    path = tmp_path / "config.py"
    path.write_text(BACKBONE)
    done = run_main(TOOL, path, *arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "error: " in done.stderr.splitlines()[-1]


def test_missing_config_is_named(run_main, tmp_path):
    done = run_main(TOOL, tmp_path / "none.py", "--shape", 32, 32)
    assert done.returncode == 1 and "none.py does not exist" in done.stderr
