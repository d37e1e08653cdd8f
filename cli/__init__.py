"""The ``longspan`` command: parses arguments and prints; every decision is made in ``longspan.exporter``."""
