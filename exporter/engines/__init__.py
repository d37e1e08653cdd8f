"""Engines: what a bundle becomes for one runtime and one architecture."""
