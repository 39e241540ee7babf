#!/usr/bin/env bash
# torch 2.13.0: a histogram stops counting at 16777216, or at a multiple of that if more threads count.
#
# The counts of a histogram add up to the number of values, and one would expect that of torch.histc and
# torch.histogram. They count in the dtype of the values, and in float32 16777216 + 1 is 16777216. Each thread
# has its own counts, so that of 40 million zeros one thread finds 16777216, two find 33554432, and four find
# all: the histogram depends on the machine. There is no warning. In float64 the counts are right.
#
# It matters to those who choose ranges from histograms of activations: 40 million values are one layer of
# width 4096 at ten windows of 1024 tokens, and zeros or a narrow middle fall into one bin. Its count beside
# those of the tails decides where to clip. Histograms of parts, added in float64, avoid it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 torch==2.13.0

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import torch

print("torch", version("torch"))
many = 40_000_000
zeros = torch.zeros(many)
for threads, expected in ((1, 2**24), (2, 2**25), (4, many)):
    torch.set_num_threads(threads)
    counts = torch.histc(zeros, bins=4, min=-1, max=1)
    density = torch.histogram(zeros, bins=4, range=(-1.0, 1.0))
    exact = torch.histc(zeros.double(), bins=4, min=-1, max=1)
    print(
        f"{threads} threads: histc counts {int(counts.sum())} of {many} values, histogram "
        f"{int(density.hist.sum())}, histc of float64 {int(exact.sum())}"
    )
    assert counts.tolist() == density.hist.tolist() == [0, 0, expected, 0]
    assert exact.tolist() == [0, 0, many, 0]
EOF_PYTHON
