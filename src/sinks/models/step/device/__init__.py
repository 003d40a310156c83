"""The decode step of a whole Llama-shaped model on a GPU, in one CUDA graph."""
