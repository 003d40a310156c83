"""Runs a stream: text in, text out, for ever, at constant memory."""
