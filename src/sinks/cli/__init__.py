"""The `sinks` command, one file for each of its commands; `main` gathers them."""
