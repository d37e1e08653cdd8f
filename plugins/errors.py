"""Errors of ``longspan.plugins``."""


class PluginError(Exception):
    """Base class of every error that ``longspan.plugins`` raises on purpose."""


class InvalidOperands(PluginError, ValueError):
    """Inputs or attributes contradict an operator's definition."""


class LibraryMissing(PluginError):
    """The compiled operator library is not part of this installation."""


class InvalidLibrary(PluginError):
    """A file is not the operator library that it should be."""
