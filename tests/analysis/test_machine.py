"""Peak memory and the facts about a machine."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mmcastling.analysis import machine
from mmcastling.analysis.machine import (
    PeakMemory,
    available_bytes,
    environment,
    estimated_peak,
    instruction_set,
)

linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory"
)


@linux
def test_peak_is_what_was_held_at_once():
    megabyte = 2**20

    def hold(megabytes):
        return torch.ones(megabytes * megabyte, dtype=torch.uint8)

    with PeakMemory() as one:
        hold(64)
    with PeakMemory() as both:
        first, second = hold(64), hold(64)
        del first, second
    with PeakMemory() as nothing:
        pass
    assert one.bytes == pytest.approx(64 * megabyte, rel=0.1)
    assert both.bytes == pytest.approx(128 * megabyte, rel=0.1)
    assert nothing.bytes < megabyte


def test_other_devices_are_refused():
    with pytest.raises(RuntimeError, match="'meta' is not known"):
        PeakMemory("meta")


def test_environment_is_plain_and_names_the_machine():
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["threads"] == torch.get_num_threads()
    assert facts["python"].startswith(f"{sys.version_info.major}.")
    assert facts["torch"] in torch.__version__
    assert facts["device"]


@pytest.mark.parametrize(
    ("amx", "capability", "expected"),
    [(True, "AVX512", "amx"), (False, "AVX512", "avx512"), (False, "NO AVX", "no_avx")],
)
def test_kinds_of_machine_are_names_of_files(monkeypatch, amx, capability, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": amx})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert instruction_set() == expected
    assert environment()["device"].endswith(f" with {expected.upper()}")


@linux
def test_a_container_may_have_less_memory_than_its_machine(monkeypatch, tmp_path):
    whole = available_bytes()
    assert 0 < whole < 2**50
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    for limit, expected in (("12000", 2000), ("max", whole)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("10000")
        assert available_bytes() == pytest.approx(expected, rel=0.5)


def test_what_results_hold_at_once_is_estimated():
    def one_after_another(x):
        for _ in range(5):
            x = torch.relu(x)
        return x

    def together(x):
        kept = [torch.relu(x) for _ in range(5)]
        return torch.cat([kept[0].view(-1), *(y.flatten() for y in kept[1:])])

    x = torch.empty(1, 3, 10, 10, device="meta")
    assert estimated_peak(one_after_another, x) == 2 * 1200
    assert estimated_peak(together, x) == 10 * 1200
