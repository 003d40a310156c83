"""`python -m sinks` is `sinks`."""

from sinks.cli.main import run

if __name__ == "__main__":
    run()
