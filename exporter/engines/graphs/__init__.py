"""What a runtime that builds engines gets: a bundle's graph, rewritten so that its parser takes it as it is meant."""
