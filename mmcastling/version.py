"""The package's version, apart so that ``setup.py`` reads it without importing."""

__version__ = "0.2.0"
