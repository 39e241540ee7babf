#!/usr/bin/env bash
# safetensors 0.8.0 reads MXFP4 scales and FP4 weights from a file, but not from the bytes of the same file.
#
# safetensors.torch.save_file and save write float8_e8m0fnu, the scales of MX formats, and float4_e2m1fn_x2,
# two 4-bit floats a byte. One would expect load(data) to read what load_file(path) reads, as for the other
# dtypes. But load, also for the result of save, raises KeyError 'F8_E8M0' or 'F4': it has a table of dtypes
# of its own, which lacks these two. A part of a float4 tensor, get_slice(name)[:2], fails as well, with an
# error about a shape: the file counts single values, torch counts pairs. So does the shape that get_slice
# gives.
#
# It matters to those who move quantized weights without a file, from a network, an archive or another
# process, or read only the rows of their rank: MX checkpoints pass every test with load_file and fail there.
# Saving both as uint8 views avoids it, as published checkpoints do.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0 torch==2.13.0

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file

print("safetensors", version("safetensors"), "torch", version("torch"))
raw = torch.arange(32, dtype=torch.uint8).reshape(4, 8) + 100


def attempt(read):
    """What a reader returns, or the error that it raises."""
    try:
        with safe_open("weights.safetensors", "pt") as file:
            return read(file)
    except (KeyError, RuntimeError) as problem:
        return problem


for dtype in (torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2):
    saved = raw.view(dtype)
    save_file({"w": saved}, "weights.safetensors")
    data = Path("weights.safetensors").read_bytes()
    assert data == save({"w": saved})
    print(f"{dtype}, shape {tuple(saved.shape)}")
    readers = {
        "load_file(path)": lambda file: load_file("weights.safetensors")["w"],
        "get_tensor": lambda file: file.get_tensor("w"),
        "load(bytes of the file)": lambda file, data=data: load(data)["w"],
        "get_slice(...)[:2]": lambda file: file.get_slice("w")[:2],
    }
    for name, read in readers.items():
        found = attempt(read)
        print(f"  {name}:", repr(found) if isinstance(found, Exception) else "right")
        if dtype in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2) and name.startswith("load(bytes"):
            assert isinstance(found, KeyError)
        elif dtype is torch.float4_e2m1fn_x2 and name.startswith("get_slice"):
            assert isinstance(found, RuntimeError)
        else:
            wanted = raw[:2] if name.startswith("get_slice") else raw
            assert found.dtype == dtype and torch.equal(found.view(torch.uint8), wanted)
    shape = attempt(lambda file: file.get_slice("w").get_shape())
    print(f"  shape by get_slice: {shape}")
    assert shape == ([4, 16] if dtype is torch.float4_e2m1fn_x2 else [4, 8])
EOF_PYTHON
