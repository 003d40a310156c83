"""Rings at addresses that never change: what a captured step works on."""
