"""The benchmark of exported models: fair contenders, honest targets."""

import pytest


@pytest.fixture
def script(load_benchmark):
    return load_benchmark("runtimes")


def result_of(script, **milliseconds):
    cells = [
        dict(
            contender=f"{script.BACKBONE}, {runtime}",
            size=list(script.SIZE),
            seconds=dict(median=milliseconds.get(runtime, 900) / 1e3),
        )
        for runtime in ("torch", *script.RUNTIMES)
    ]
    return dict(cells=cells, rounding={"OpenVINO": 1.2e-6})


def test_every_runtime_meets_torch_on_the_backbone_and_on_a_detector(script):
    names = set(script.BENCHMARK.contenders)
    for model in (script.BACKBONE, script.DETECTOR):
        for runtime in ("torch", "torch compiled", "onnxruntime", "OpenVINO"):
            assert f"{model}, {runtime}" in names
    assert {f"{script.BACKBONE}, {name}" for name in script.RUNTIMES} <= names


def test_the_target_is_the_best_runtime_over_eager(script):
    times = {"torch": 1000, "OpenVINO": 700, "onnxruntime int8": 400}
    best, full = script.targets(result_of(script, **times))
    assert best.measured == pytest.approx(0.4)
    assert full.measured == pytest.approx(0.7)
    assert best.reached and full.reached
    assert not script.targets(result_of(script, torch=1000))[1].reached


def test_the_report_shows_the_rounding(script):
    text = script.section(result_of(script), "| a table |\n")
    assert "| a table |" in text
    assert "| OpenVINO | 1.2e-06 |" in text
