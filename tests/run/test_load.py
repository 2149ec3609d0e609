"""What pruning may change before it is refused."""

import math

import pytest

from mmcastling.checkpoint import CheckpointError
from mmcastling.run.load import PruningReport


@pytest.mark.parametrize(
    ("difference", "magnitude", "refused"),
    [
        (9e-6, 0.5, False),
        (1.1e-5, 0.5, True),
        (9e-4, 100.0, False),  # rounding grows with the features
        (1.1e-3, 100.0, True),
    ],
)
@pytest.mark.parametrize("was_on", [False, True])
def test_what_was_measured_decides(difference, magnitude, refused, was_on):
    report = PruningReport(4, was_on, difference, magnitude)
    if refused:
        with pytest.raises(CheckpointError, match=r"up to (0\.0011|1\.1e-05)"):
            report.refuse_if_changed("last.pth")
    else:
        assert report.refuse_if_changed("last.pth") is None


def test_where_nothing_was_measured_the_state_decides():
    assert PruningReport(4, was_on=False).refuse_if_changed("last.pth") is None
    with pytest.raises(CheckpointError, match="its state says that the branch is on"):
        PruningReport(4, was_on=True).refuse_if_changed("last.pth")


def test_features_that_are_not_finite_are_refused():
    report = PruningReport(4, False, math.nan, 1.0)
    with pytest.raises(CheckpointError, match=r"features of last\.pth are not finite"):
        report.refuse_if_changed("last.pth")
