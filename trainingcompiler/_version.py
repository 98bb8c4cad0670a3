"""The version, as the package, the banner and the run record give it."""

__version__ = "0.1.0"
