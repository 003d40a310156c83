"""Attention over sinks and a window on a GPU, forward and backward, by three routes that pass the same tests."""
