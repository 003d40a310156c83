#!/bin/sh
# One session reads 300,000 real tokens on the CPU, then decodes: figures and picture of docs/soak.md.
# Ten minutes on two idle cores. Run it from the root of the repository, with `sinks` installed:
#
#   runs/soak.sh [python] [further options of benchmarks/soak.py]
set -eu
python=${1:-python}
[ $# -eq 0 ] || shift
exec "$python" benchmarks/soak.py --tokens 300000 --json docs/soak.json --picture docs/soak.png "$@"
