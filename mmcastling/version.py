"""The package's version, apart so that ``setup.py`` reads it without importing."""

__version__ = "0.1.0"
