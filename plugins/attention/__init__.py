"""What the attention operators share: operands and their checks, torch arithmetic, and the row tiles of the kernels."""
