"""Kernels for GPUs, written in Triton, and their launches: what `kernels.band` is made of."""
