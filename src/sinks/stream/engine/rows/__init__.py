"""The rows of an engine: a stream in a slot, and what many of them do in one pass."""
