"""Weights kept in fewer bits, multiplied by kernels that PyTorch ships for CPUs."""
