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
    detector = dict(bbox=0.212, segm=0.24, seconds=0.3)
    return dict(
        cells=cells,
        rounding={"OpenVINO": 1.2e-6},
        detector={name: dict(detector) for name in ("torch", *script.RUNTIMES)},
    )


def test_every_runtime_meets_torch_on_the_backbone_and_on_a_detector(script):
    names = set(script.BENCHMARK.contenders)
    for model in (script.BACKBONE, script.DETECTOR):
        for runtime in ("torch", "torch compiled", "onnxruntime", "OpenVINO"):
            assert f"{model}, {runtime}" in names
    here = {f"{script.BACKBONE}, {name}" for name in script.available()}
    assert here <= names
    assert {f"{script.BACKBONE}, {name}" for name in script.RUNTIMES} - here == {
        f"{script.BACKBONE}, {name}" for name in script.lacking()
    }


def test_the_target_is_the_best_runtime_over_eager(script):
    times = {"torch": 1000, "OpenVINO": 700, "onnxruntime int8": 450}
    times["OpenVINO int8"] = 395
    best, full, int8, _ = script.targets(result_of(script, **times))
    assert best.measured == pytest.approx(0.395)
    assert full.measured == pytest.approx(0.7)
    assert int8.measured == pytest.approx(1 / 0.395)
    assert best.reached and full.reached and int8.reached
    slow = script.targets(result_of(script, torch=1000))
    assert not any(target.reached for target in slow[:3])


def test_only_files_in_float32_must_keep_the_ap(script):
    result = result_of(script)
    result["detector"]["OpenVINO int8"]["bbox"] -= 0.004
    *_, same = script.targets(result)
    assert same.reached and same.measured == 0
    result["detector"]["onnxruntime"]["segm"] += 0.001
    *_, same = script.targets(result)
    assert not same.reached and same.measured == pytest.approx(0.001)


def test_a_result_without_what_its_machine_lacked_has_targets(script):
    result = result_of(script)
    del result["detector"]["OpenVINO bf16"]
    result["cells"] = [c for c in result["cells"] if "bf16" not in c["contender"]]
    assert len(script.targets(result)) == 4


def test_the_report_shows_the_rounding(script):
    text = script.section(result_of(script), "| a table |\n")
    assert "| a table |" in text
    assert "| OpenVINO | 1.2e-06 |" in text
    assert "| OpenVINO bf16 | 0.212 | 0.240 | 0.300 |" in text
