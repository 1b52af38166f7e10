"""PEFT's classes of warnings and errors, which scripts catch by name."""

from __future__ import annotations


class PeftWarning(UserWarning):
    """A warning that PEFT gives in the same place."""


class PeftError(Exception):
    """What PEFT's own errors inherit from."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A configuration matches no module of the model."""


class SettingError(ValueError):
    """Settings that are wrong. Their names stand between backticks, which the command line makes flags of."""
