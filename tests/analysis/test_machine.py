"""Peak memory and the facts about a machine."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mmcastling.analysis.machine import PeakMemory, environment

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
