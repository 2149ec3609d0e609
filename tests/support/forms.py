"""Forms of the attention that several tests name."""

RELEASED = dict(form="released", center_keys=False)
"""What our backbones have and ``castle`` has not, unless it is told."""
