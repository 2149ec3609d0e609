"""Distillation: what the loss is, and that the teacher leaves no trace."""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage, MMDistributedDataParallel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.apis import ModelHub
from mmpretrain.structures import DataSample
from torch import nn
from torch.testing import assert_close

from mmcastling.checkpoint import CheckpointError
from mmcastling.models import DistilledClassifier, LeViTHead, Teacher
from mmcastling.run.conversion import deploy_config
from mmcastling.verbs import set_mask, switch_to_deploy

BACKBONE = dict(type="mmcastling.CastlingViT", arch="nano", img_size=32, patch_size=8)
HEAD = dict(
    type="mmpretrain.VisionTransformerClsHead",
    num_classes=5,
    in_channels=128,
    init_cfg=dict(type="Normal", layer="Linear", std=0.5),
)
PLAIN = dict(type="mmpretrain.ImageClassifier", backbone=BACKBONE, head=HEAD)
TEACHER = dict(PLAIN, backbone=dict(BACKBONE, attention=dict(type="softmax")))
LEVIT = dict(
    backbone=dict(type="mmcastling.CastlingLeViT", arch="128s"),
    neck=dict(type="mmpretrain.GlobalAveragePooling"),
    head=dict(type="mmcastling.LeViTHead", num_classes=5, in_channels=384),
)


def build(teacher, **options):
    config = copy.deepcopy(
        {**PLAIN, **options, "type": "mmcastling.DistilledClassifier"}
    )
    return MODELS.build(dict(config, teacher=teacher))


def plain_teacher(seed=1, **changes):
    torch.manual_seed(seed)
    teacher = MODELS.build(copy.deepcopy({**TEACHER, **changes}))
    teacher.init_weights()
    return teacher


@pytest.fixture(autouse=True)
def classification():
    """The toolbox whose data preprocessor is meant, whatever ran before."""
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield


@pytest.fixture
def saved_teacher(tmp_path):
    path = tmp_path / "teacher.pth"
    teacher = plain_teacher()
    torch.save({"state_dict": teacher.state_dict(), "meta": {}}, path)
    return teacher.eval(), path


@pytest.fixture
def batch():
    torch.manual_seed(0)
    inputs = torch.randn(4, 3, 32, 32)
    samples = [DataSample().set_gt_label(label) for label in (0, 3, 4, 1)]
    return inputs, samples


LABELS = torch.tensor([0, 3, 4, 1])


# -- the loss --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "alpha", "temperature"),
    [("hard", 0.5, 1.0), ("hard", 0.3, 4.0), ("soft", 0.1, 3.0), ("soft", 1.0, 1.0)],
)
def test_the_loss_is_the_formula_of_the_paper(
    saved_teacher, batch, mode, alpha, temperature
):
    teacher, path = saved_teacher
    model = build(
        teacher=TEACHER,
        teacher_checkpoint=str(path),
        mode=mode,
        alpha=alpha,
        temperature=temperature,
    ).eval()
    inputs, samples = batch
    losses = model.loss(inputs, samples)
    with torch.no_grad():
        student, theirs = model(inputs), teacher(inputs)
    base = -student.log_softmax(1)[range(4), LABELS].mean()
    if mode == "hard":
        distilled = -student.log_softmax(1)[range(4), theirs.argmax(1)].mean()
    else:
        p, q = (theirs / temperature).softmax(1), (student / temperature).softmax(1)
        distilled = temperature**2 * (p * (p / q).log()).sum(1).mean()
    assert_close(losses["loss"], (1 - alpha) * base)
    assert_close(losses["loss_distillation"], alpha * distilled)
    assert distilled > 0.1


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(batch):
    teacher = plain_teacher()
    model = build(
        backbone=TEACHER["backbone"], teacher=teacher, mode="soft", temperature=2.0
    )
    model.load_state_dict(teacher.state_dict())
    losses = model.eval().loss(*batch)
    assert_close(losses["loss_distillation"], torch.tensor(0.0), atol=1e-6, rtol=0)


def test_gradients_reach_the_student_and_not_the_teacher(batch):
    teacher = plain_teacher()
    model = build(teacher=teacher, alpha=1.0).train()
    loss, _ = model.parse_losses(model.loss(*batch))
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in model.backbone.layers[0].parameters())


def test_the_teacher_stays_in_evaluation_whoever_touches_it(batch):
    teacher = plain_teacher(backbone=dict(TEACHER["backbone"], drop_path_rate=0.9))
    model = build(teacher=teacher)
    model.init_weights()
    teacher.train()
    model.train()
    inputs, _ = batch
    assert_close(model._teacher(inputs), model._teacher(inputs), atol=0, rtol=0)
    assert not teacher.training


def test_two_outputs_of_a_levit_head_have_a_target_each(batch):
    teacher = plain_teacher()
    model = build(**LEVIT, teacher=teacher, alpha=0.25)
    model.init_weights()
    model.eval()
    inputs, samples = batch
    losses = model.loss(inputs, samples)
    x = model.extract_feat(inputs)[-1]
    labels, taught = model.head.head(x), model.head.head_dist(x)
    with torch.no_grad():
        target = teacher(inputs).argmax(1)
    assert_close(losses["loss"], 0.75 * F.cross_entropy(labels, LABELS))
    assert_close(losses["loss_distillation"], 0.25 * F.cross_entropy(taught, target))
    assert_close(model(inputs), (labels + taught) / 2)


MMPRETRAIN_DEIT = dict(
    type="mmpretrain.DistilledVisionTransformer",
    arch={**dict.fromkeys(("num_layers", "num_heads"), 2), "embed_dims": 128}
    | {"feedforward_channels": 128},
    img_size=32,
)
DEIT = dict(
    backbone=dict(BACKBONE, with_dist_token=True),
    head=dict(type="mmpretrain.DeiTClsHead", num_classes=5, in_channels=128),
)


@pytest.mark.parametrize("backbone", [MMPRETRAIN_DEIT, DEIT["backbone"]])
def test_a_distillation_token_learns_from_the_teacher_alone(backbone, batch):
    teacher = plain_teacher()
    model = build(backbone=backbone, head=DEIT["head"], teacher=teacher, alpha=1.0)
    model.init_weights()
    for linear in (model.head.layers.head, model.head.layers.head_dist):
        nn.init.normal_(linear.weight, std=0.1)  # mmpretrain's are zero at first
    inputs, samples = batch
    losses = model.eval().loss(inputs, samples)
    feats = model.extract_feat(inputs)
    tokens = model.head.pre_logits(feats)
    labels, taught = (
        model.head.layers.head(tokens[0]),
        model.head.layers.head_dist(tokens[1]),
    )
    with torch.no_grad():
        target = teacher(inputs).argmax(1)
    assert_close(losses["loss_distillation"], F.cross_entropy(taught, target))
    assert_close(model(inputs), (labels + taught) / 2)
    losses["loss_distillation"].backward()
    layers = model.head.layers
    assert layers.head_dist.weight.grad.abs().sum() > 0
    assert layers.head.weight.grad is None
    assert model.backbone.dist_token.grad.abs().sum() > 0


def test_soft_labels_of_mixup_reach_the_head(batch):
    inputs, samples = batch
    for sample in samples:
        sample.set_gt_score(torch.full((5,), 0.2))
    head = dict(
        HEAD,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    )
    model = build(teacher=plain_teacher(), head=head).eval()
    losses = model.loss(inputs, samples)
    expected = -model(inputs).log_softmax(1).mean(1).mean()
    assert_close(losses["loss"], 0.5 * expected)


# -- what the teacher is given ---------------------------------------------------------


def test_inputs_are_converted_to_the_teachers_normalisation():
    student = dict(mean=[120.0, 110.0, 100.0], std=[60.0, 50.0, 40.0], to_rgb=True)
    theirs = dict(mean=[127.5] * 3, std=[127.5] * 3, to_rgb=False)
    images = torch.randint(0, 256, (2, 3, 32, 32))
    teacher = plain_teacher(data_preprocessor=theirs)
    model = build(teacher=teacher, data_preprocessor=student)
    model.init_weights()
    expected = teacher(teacher.data_preprocessor(dict(inputs=images))["inputs"])
    inputs = model.data_preprocessor(dict(inputs=images))["inputs"]
    assert_close(model._teacher(inputs), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert (teacher(inputs) - expected).abs().max() > 0.01


def test_timm_weights_bring_their_statistics(monkeypatch, batch):
    """``pretrained=True`` would download: what it returns is made here."""
    create = timm.create_model
    monkeypatch.setattr(
        timm.models, "create_model", lambda *a, pretrained, **k: create(*a, **k)
    )
    config = dict(
        type="TimmClassifier",
        model_name="vit_tiny_patch16_224",
        img_size=32,
        num_classes=5,
        pretrained=True,
    )
    model = build(
        teacher=config,
        data_preprocessor=dict(mean=[120.0] * 3, std=[60.0] * 3, to_rgb=False),
    )
    model.init_weights()
    inputs, _ = batch
    theirs = (inputs.flip(1) * 60.0 + 120.0 - 127.5) / 127.5  # vit's 0.5, and RGB
    with torch.no_grad():
        assert_close(model._teacher(inputs), model._teacher._module(theirs))


def test_a_timm_checkpoint_teaches(tmp_path, batch):
    source = timm.create_model("resnet10t", num_classes=5).eval()
    path = tmp_path / "timm.pth"
    torch.save(source.state_dict(), path)
    config = dict(type="TimmClassifier", model_name="resnet10t", num_classes=5)
    model = build(teacher=config, teacher_checkpoint=path)
    model.init_weights()
    inputs, _ = batch
    with torch.no_grad():
        assert_close(model._teacher(inputs), source(inputs))


def test_the_teacher_may_be_a_config_file(tmp_path, saved_teacher, batch):
    teacher, path = saved_teacher
    config = tmp_path / "teacher.py"
    Config(dict(model=TEACHER)).dump(config)
    model = build(teacher=str(config), teacher_checkpoint=str(path))
    model.init_weights()
    inputs, _ = batch
    with torch.no_grad():
        assert_close(model._teacher(inputs), teacher(inputs))


def test_the_teacher_may_be_a_name_with_published_weights(
    monkeypatch, saved_teacher, batch
):
    teacher, path = saved_teacher
    found = SimpleNamespace(config=Config(dict(model=TEACHER)), weights=str(path))
    monkeypatch.setattr(ModelHub, "get", {"a_model": found}.__getitem__)
    model = build(teacher="a_model")
    model.init_weights()
    inputs, _ = batch
    with torch.no_grad():
        assert_close(model._teacher(inputs), teacher(inputs))
    with pytest.raises(CheckpointError, match=r"missing\.pth does not exist"):
        build(teacher="a_model", teacher_checkpoint="missing.pth").init_weights()


# -- no trace --------------------------------------------------------------------------


def test_checkpoints_are_those_of_the_plain_classifier(saved_teacher):
    plain = MODELS.build(copy.deepcopy(PLAIN))
    model = build(teacher=TEACHER, teacher_checkpoint=str(saved_teacher[1]))
    model.init_weights()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    assert len(list(model.modules())) == len(list(plain.modules()))
    optimizer = build_optim_wrapper(
        model, dict(optimizer=dict(type="SGD", lr=0.1))
    ).optimizer
    trained = sum(len(group["params"]) for group in optimizer.param_groups)
    assert trained == len(list(plain.parameters()))


def test_with_the_same_seed_a_student_begins_alike_taught_or_not(saved_teacher):
    states = []
    for taught in (True, False):
        torch.manual_seed(7)
        model = (
            build(teacher=TEACHER, teacher_checkpoint=str(saved_teacher[1]))
            if taught
            else MODELS.build(copy.deepcopy(PLAIN))
        )
        model.init_weights()
        states.append({**model.state_dict(), "next": torch.rand(3)})
    assert_close(*states, atol=0, rtol=0)


def test_a_model_is_built_and_tested_without_the_teachers_file(batch):
    model = build(teacher=TEACHER, teacher_checkpoint="missing.pth").eval()
    inputs, samples = batch
    assert model.predict(inputs, samples)[0].pred_score.shape == (5,)


def test_averages_hold_no_second_teacher(batch):
    teacher = plain_teacher()
    model = build(teacher=teacher)
    model.init_weights()
    average = ExponentialMovingAverage(model, momentum=0.5)
    assert average.module._teacher is model._teacher
    held = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in average.module.parameters()) == held
    average.update_parameters(model)
    with torch.no_grad():
        model.head.layers.head.bias.add_(1.0)
    average.update_parameters(model)
    inputs, _ = batch
    gap = model.eval()(inputs) - average.module.eval()(inputs)
    assert_close(gap, torch.full_like(gap, 0.5))


def test_deploying_drops_the_teacher_from_the_copy_alone(batch):
    model = build(teacher=plain_teacher())
    model.init_weights()
    set_mask(model, 1.0)
    deployed = switch_to_deploy(model).eval()
    assert deployed._teacher is None and model._teacher.is_ready
    inputs, samples = batch
    assert_close(deployed(inputs), model.eval()(inputs))
    with pytest.raises(RuntimeError, match="deployed and has no teacher"):
        deployed.loss(inputs, samples)
    model.loss(inputs, samples)


@pytest.mark.parametrize("options", [{}, LEVIT, DEIT], ids=["vit", "levit", "deit"])
def test_the_deployed_config_builds_a_plain_classifier(options):
    model = build(**options, teacher=TEACHER, teacher_checkpoint="missing.pth")
    config = {**PLAIN, **options, "type": "mmcastling.DistilledClassifier"}
    config.update(teacher=TEACHER, teacher_checkpoint="missing.pth", mode="soft")
    deployed = deploy_config(Config(dict(model=copy.deepcopy(config))))
    assert "teacher" not in deployed.pretty_text and "soft" not in deployed.pretty_text
    built = MODELS.build(deployed.model)
    assert type(built).__name__ == "ImageClassifier"
    built.load_state_dict(switch_to_deploy(model).state_dict())


def test_a_levit_head_is_the_same_fused():
    torch.manual_seed(0)
    for distillation in (True, False):
        head = LeViTHead(7, 16, distillation=distillation)
        for module in head.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                nn.init.normal_(module.weight)
        head.eval()
        x = torch.randn(3, 16)
        expected = head((x,))
        head.switch_to_deploy()
        assert_close(head((x,)), expected)
        built = LeViTHead(7, 16, distillation=distillation, deploy=True).eval()
        built.load_state_dict(head.state_dict())
        assert_close(built((x,)), expected)


def test_distributed_training_holds_the_students_parameters_alone(tmp_path, batch):
    model = build(teacher=plain_teacher(), mode="soft")
    model.init_weights()
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-5))
    inputs, samples = batch
    data = dict(inputs=inputs, data_samples=samples)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        # An unused parameter would fail the second step.
        wrapped = MMDistributedDataParallel(model, find_unused_parameters=False)
        losses = [wrapped.train_step(data, optimizer) for _ in range(3)]
    finally:
        torch.distributed.destroy_process_group()
    assert losses[2]["loss"] < losses[0]["loss"]
    assert {"loss", "loss_distillation"} <= set(losses[0])
    assert not [name for name in wrapped.state_dict() if "teacher" in name]


@pytest.mark.slow
def test_a_compiled_training_step_equals_the_eager_one(batch):
    torch.manual_seed(3)
    model = build(teacher=plain_teacher(), mode="soft", alpha=0.5)
    model.init_weights()
    inputs, samples = batch
    expected = model.loss(inputs, samples)
    compiled = torch.compile(model.loss, backend="eager")(inputs, samples)
    assert_close(compiled, expected)


# -- bad input -------------------------------------------------------------------------


def test_a_teacher_of_other_classes_is_refused_before_training():
    teacher = plain_teacher(head=dict(HEAD, num_classes=7))
    model = build(teacher=teacher)
    with pytest.raises(ValueError, match="teacher has 7 classes, the student 5"):
        model.init_weights()


def test_a_teacher_that_hides_its_classes_is_refused_at_the_first_batch(batch):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))
    model = build(teacher=teacher)
    model.init_weights()
    with pytest.raises(ValueError, match="teacher has 7 classes, the student 5"):
        model.loss(*batch)


def test_a_teacher_without_logits_is_refused(batch):
    model = build(teacher=nn.Conv2d(3, 5, 1))
    with pytest.raises(ValueError, match=r"Conv2d, returns a Tensor \(4, 5, 32, 32\)"):
        model.loss(*batch)


def test_a_missing_checkpoint_is_named_before_training():
    model = build(teacher=TEACHER, teacher_checkpoint="missing.pth")
    with pytest.raises(CheckpointError, match=r"teacher: .* missing.pth does not"):
        model.init_weights()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, path)
    model = build(teacher=TEACHER, teacher_checkpoint=str(path))
    with pytest.raises(CheckpointError, match=r"teacher: .* another architecture"):
        model.init_weights()


def test_a_checkpoint_with_code_is_refused(attack):
    model = build(teacher=TEACHER, teacher_checkpoint=attack.path)
    with pytest.raises(CheckpointError, match="asks to run code"):
        model.init_weights()
    assert not attack.trace.exists()


def test_a_teacher_without_weights_is_refused():
    with pytest.raises(ValueError, match="would teach noise"):
        build(teacher=TEACHER).init_weights()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="medium"), "mode 'medium' is not known"),
        (dict(alpha=1.5), "alpha=1.5 is no share"),
        (dict(temperature=0.0), r"temperature=0.0 must be above 0"),
        (dict(teacher=3), "teacher 3 must be the config"),
        (dict(teacher=nn.Linear(1, 1), teacher_checkpoint="a.pth"), "built already"),
        (dict(head=None), "head NoneType has no logits"),
    ],
)
def test_bad_options_are_refused_when_built(options, message):
    config = {**PLAIN, "teacher": TEACHER, **options}
    config.pop("type")
    with pytest.raises(ValueError, match=message):
        DistilledClassifier(**copy.deepcopy(config))


def test_a_config_file_that_is_not_there_is_named():
    for name in ("nowhere.py", "mmpretrain::nowhere.py", "no_model_of_mmpretrain"):
        with pytest.raises(ValueError, match=rf"teacher {name} does not exist"):
            Teacher(name, "a.pth").prepare(nn.Linear(1, 1))
