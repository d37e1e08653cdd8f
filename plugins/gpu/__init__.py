"""What the GPU kernels of all operators share: the records of a launch, tile sizes, device functions, compilation."""
