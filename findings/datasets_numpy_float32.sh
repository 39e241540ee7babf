#!/usr/bin/env bash
# datasets 5.2.0: in NumPy format a float64 column is float64 read by row, and float32 read by slice.
#
# A column of float64 has that dtype in its features, and NumPy has it too, so one would expect
# with_format("numpy") to give it. ds[0]["x"] does. But ds[:]["x"] and the batches of ds.iter() are float32,
# so the same number read in two ways differs, and a batched map in this format stores the rounded ones.
# Integers keep all their bits either way. Without a format, and in pandas format, the numbers are float64.
#
# It matters to those who keep measurements in a data set, such as log-likelihoods or errors of a quantized
# model: sums of slices have 7 digits, and a difference of two runs is rounding. with_format("numpy",
# dtype="float64") gives float64 for all.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HOME="$tmp/home" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check datasets==5.2.0 numpy==2.4.6 pyarrow==26.0.1

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import numpy as np
from datasets import Dataset

print("datasets", version("datasets"), "numpy", version("numpy"))


def same(rows):
    return {"x": rows["x"]}


third = 1 / 3
rows = Dataset.from_dict({"x": [third, 2 / 3], "n": [2**60 + 1, 2]})
assert rows.features["x"].dtype == "float64"
numpy = rows.with_format("numpy")
ways = {
    "a row": numpy[0]["x"],
    "a slice": numpy[:1]["x"][0],
    "a batch of iter": next(numpy.iter(1))["x"][0],
    "a row after map": numpy.map(same).with_format(None)[0]["x"],
    "a row after batched map": numpy.map(same, batched=True).with_format(None)[0]["x"],
    "a slice without a format": rows[:1]["x"][0],
    "a slice in pandas format": rows.with_format("pandas")[:1]["x"][0],
    "a slice with the dtype given": rows.with_format("numpy", dtype="float64")[:1]["x"][0],
}
wrong = {way for way, x in ways.items() if float(x) != third}
for way, x in ways.items():
    print(f"{way}: {type(x).__name__} {float(x)!r}")
assert isinstance(ways["a row"], np.float64) and isinstance(ways["a slice"], np.float32)
assert wrong == {"a slice", "a batch of iter", "a row after batched map"}
assert numpy[0]["n"] == numpy[:1]["n"][0] == 2**60 + 1
EOF_PYTHON
