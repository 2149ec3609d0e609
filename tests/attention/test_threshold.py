"""Reading, resolving and interpolating mask thresholds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcastling.attention import MaskThreshold


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.02, (0.02, 0.0)),
        (1, (1.0, 0.0)),
        ("0.02", (0.02, 0.0)),
        ("4/N", (0.0, 4.0)),
        ("2.5 / n", (0.0, 2.5)),
        ("0.01+2/N", (0.01, 2.0)),
        ("1e-3 + 4/N", (0.001, 4.0)),
    ],
)
def test_parse(value, expected):
    threshold = MaskThreshold.parse(value)
    assert (threshold.probability, threshold.multiple) == expected


@pytest.mark.parametrize(
    "value",
    [-0.1, 1.5, float("nan"), "-1/N", "4/M", "", "N", "0.2/", None, True, [0.1], "2"],
)
def test_bad_values_are_named(value):
    with pytest.raises(ValueError, match="mask threshold"):
        MaskThreshold.parse(value)


@given(st.floats(0, 1), st.floats(0, 100))
def test_text_form_reads_back(probability, multiple):
    threshold = MaskThreshold(float(f"{probability:g}"), float(f"{multiple:g}"))
    assert MaskThreshold.parse(str(threshold)) == threshold


@given(st.floats(0, 1), st.floats(0, 8), st.floats(0, 1), st.integers(8, 10**6))
def test_interpolation_is_linear_in_the_resolved_probability(p, m, fraction, keys):
    start, end = MaskThreshold(p, m), MaskThreshold(1.0, 0.0)
    middle = start.interpolate(end, fraction).resolve(keys)
    # The resolved value is capped at 1, the interpolation is not.
    raw = p + m / keys
    assert middle == pytest.approx(min(1.0, raw + (1.0 - raw) * fraction), abs=1e-9)


def test_the_end_of_an_interpolation_is_exact():
    assert MaskThreshold(0.02).interpolate(MaskThreshold(1.0), 1.0).rejects_all
    assert not MaskThreshold(0.02).interpolate(MaskThreshold(1.0), 0.999).rejects_all


def test_resolved_probability_is_capped():
    assert MaskThreshold.parse("4/N").resolve(2) == 1.0
