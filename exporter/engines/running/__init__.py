"""Engines as Polygraphy runners, and what they need to run."""
