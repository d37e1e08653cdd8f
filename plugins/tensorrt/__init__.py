"""The operators in TensorRT."""
