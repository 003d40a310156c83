"""Reads a stream through a cache: the surprise of every token, and the memory that it took."""
