#!/bin/sh
# Writes the figures of one run into README.md, bench/RESULTS.md and bench/speed.png.
#
#   bench/publish.sh                 runs all benchmarks first, about an hour; the machine should be at rest
#   bench/publish.sh results.json    takes the file that --benchmark-json of such a run wrote
set -eu
cd "$(dirname "$0")/.."
results=${1:-results.json}
if [ $# -eq 0 ]; then
    # A benchmark that fails leaves a gap in a table, and does not cost the others.
    pytest bench --benchmark-only --benchmark-json="$results" || echo "some benchmarks failed" >&2
fi
python bench/report.py "$results" --into bench/RESULTS.md
python bench/report.py "$results" --only "one sequence, 2 threads" --into README.md
python bench/chart.py "$results" bench/speed.png
