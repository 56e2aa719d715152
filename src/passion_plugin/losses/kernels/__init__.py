"""Triton kernels of the losses, for CUDA tensors."""
