"""Errors of ``longspan.exporter``; the command line maps each class to one exit code."""


class ExporterError(Exception):
    """Base class of every error that ``longspan.exporter`` raises on purpose.

    The text is one line or more: what failed, what was got, what is allowed, the next step.
    """


class InvalidRequest(ExporterError, ValueError):
    """The arguments contradict each other, the model, or what exists on disk."""


class ExportFailed(ExporterError):
    """Tracing, rewriting or saving a model failed."""


class NothingReplaced(ExportFailed):
    """A rewrite was requested and no attention site matched it."""


class BundleCorrupted(ExporterError):
    """A bundle's files are missing, unreadable or differ from its manifest."""


class EnvironmentLacks(ExporterError):
    """A package or file that the request needs is not available here."""


class FallbackRan(ExporterError):
    """A kernel was required and a function body ran instead."""
