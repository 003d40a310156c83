"""Checkpoints on disk: what a folder holds, GGUF rewritten as safetensors, snapshots of the Hub. Never a pickle."""
