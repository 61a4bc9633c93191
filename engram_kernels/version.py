"""The version, in one place: pyproject.toml reads it without importing the package, and so without torch."""

__version__ = "0.1.0"
