#!/usr/bin/env bash
# zstandard 0.25.0: a .zst file that was cut off is read as a shorter text, by datasets and pandas too.
#
# A zstd frame states where it ends, as a gzip member does, and may state its length and a checksum. One would
# expect an error for a file whose download or copy broke off, as gzip raises EOFError. stream_reader of
# zstandard takes the end of the input for the end of the text, with length and checksum in the file as well.
# fsspec 2026.9.0 reads .zst by it unless backports.zstd is installed (or Python is 3.14), and so do datasets
# 5.2.0 and pandas 3.1.1: the rows up to there come back, the last one a piece of a line, and nothing is said.
# Rows of JSON fail only if the cut falls inside a row, with an error about a quotation mark.
#
# It matters to those who calibrate or measure on text that comes as .zst: on half of it the perplexity is
# another one, without a sign. zstandard is what datasets and pandas ask to install. With backports.zstd
# beside it fsspec and datasets raise EOFError; pandas needs a check of the file.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HOME="$tmp/home" HF_HUB_OFFLINE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check datasets==5.2.0 fsspec==2026.9.0 pandas==3.1.1 zstandard==0.25.0

cat > read.py <<'EOF_PYTHON'
import gzip
import io
import sys
from importlib.metadata import version
from pathlib import Path

import datasets
import fsspec
import pandas
import zstandard

datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)
LINES = 40000
text = "".join(f"line {i} {i * i * 7919 % 1000003} {i * i * i % 999983}\n" for i in range(LINES)).encode()
packed = {"gz": gzip.compress(text), "zst": zstandard.ZstdCompressor(write_checksum=True).compress(text)}
frame = zstandard.get_frame_parameters(packed["zst"])
assert frame.content_size == len(text) and frame.has_checksum
for kind, data in packed.items():
    Path(f"cut.txt.{kind}").write_bytes(data[: len(data) // 2])


def by_zstandard(path):
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(Path(path).read_bytes())) as file:
        return file.read().splitlines()


def by_fsspec(path):
    with fsspec.open(path, "rb", compression="infer") as file:
        return file.read().splitlines()


def by_datasets(path):
    cache = f"cache-{sys.argv[1]}"
    return datasets.load_dataset("text", data_files=path, split="train", cache_dir=cache)["text"]


def by_pandas(path):
    return pandas.read_csv(path, header=None)[0]


def attempt(read, path):
    """The number of lines, or the name of the error."""
    try:
        return len(read(path))
    except Exception as problem:
        return type(problem.__cause__ or problem).__name__


print("zstandard", version("zstandard"), sys.argv[1], f"backports.zstd; the whole text has {LINES} lines")
for read in (by_zstandard, by_fsspec, by_datasets, by_pandas):
    kinds = ["zst"] if read is by_zstandard else [*packed]
    found = {kind: attempt(read, f"cut.txt.{kind}") for kind in kinds}
    print(f"  {read.__name__}, half of a file:", *(f"{kind}: {what}" for kind, what in found.items()))
    assert found.get("gz", "EOFError") == "EOFError"
    if sys.argv[1] == "with" and read in (by_fsspec, by_datasets):
        assert found["zst"] == "EOFError"
    else:
        assert 0 < found["zst"] < LINES
EOF_PYTHON
env/bin/python read.py without
env/bin/pip install --quiet --no-compile --disable-pip-version-check backports.zstd==1.8.0
env/bin/python read.py with
