"""Target ``ort``: an optimised model, and the session that it is opened with."""
