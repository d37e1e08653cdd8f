"""What the attention operators have in common: operands and their checks, torch arithmetic, and the worker of the kernels."""
