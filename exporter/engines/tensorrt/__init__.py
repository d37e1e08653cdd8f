"""Building with TensorRT and TensorRT-RTX, in a process of its own."""
