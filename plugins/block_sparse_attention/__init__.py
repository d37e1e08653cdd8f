"""BlockSparseAttention: definition, reference, function body, torch op and kernels."""
