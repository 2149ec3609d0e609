"""Errors that a person can act on: each says what was found, expected, and to do.

A command shows a :class:`UserError` as one paragraph. Whatever else is raised is a
defect and keeps its traceback. The second base of each class is Python's own error for
its kind, by which it can be caught as well.
"""

from __future__ import annotations


class UserError(Exception):
    """Anything that a person who uses this package can put right."""


class OptionError(UserError, ValueError):
    """A value that was given, and which cannot work."""


class ConfigError(OptionError):
    """A config, or an option that changes it, which cannot work."""


class UnavailableError(UserError, RuntimeError):
    """What this machine, this installation or this model does not offer."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be read, does not fit, or cannot be written."""


class DamagedCheckpointError(CheckpointError):
    """A file that is truncated or no checkpoint at all."""
