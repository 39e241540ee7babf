#!/usr/bin/env bash
# safetensors 0.8.0 saves the conjugate of a complex tensor without conjugating it.
#
# One would expect load(save({"z": z.conj()})) to be z.conj(), as torch.save and NumPy give it. conj() of
# torch copies nothing: it sets a bit that says how to read the numbers. safetensors.torch checks that the
# tensor is contiguous, which it is, and writes the memory as it lies there. So the file holds z: every
# imaginary part has the wrong sign, with the right shape and dtype. Transposing and conjugating in one step
# (.mH) is refused, as it is not contiguous.
#
# It matters to those who store rotations of a rotary embedding as complex numbers, as the first Llama code
# holds them, or state-space parameters: the positions turn the other way, and no check of shapes, dtypes or
# magnitudes shows it. resolve_conj() or conj_physical() before saving avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0 torch==2.13.0

env/bin/python - <<'EOF_PYTHON'
import io
from importlib.metadata import version

import torch
from safetensors.torch import load, load_file, save, save_file

print("safetensors", version("safetensors"), "torch", version("torch"))
angles = torch.outer(torch.arange(4.0), 10000.0 ** -torch.arange(0, 1, 0.25))
turn = torch.polar(torch.ones_like(angles), angles)
back = turn.conj()
assert back.is_contiguous() and not torch.equal(back, turn)

save_file({"back": back}, "turns.safetensors")
for name, found in (
    ("load(save)", load(save({"back": back}))["back"]),
    ("load_file", load_file("turns.safetensors")["back"]),
):
    print(f"{name}: the conjugate {torch.equal(found, back)}, the original {torch.equal(found, turn)}")
    assert torch.equal(found, turn)

memory = io.BytesIO()
torch.save(back, memory)
memory.seek(0)
assert torch.equal(torch.load(memory), back)
for name, physical in (("resolve_conj()", back.resolve_conj()), ("conj_physical()", turn.conj_physical())):
    found = load(save({"back": physical}))["back"]
    print(f"{name} before saving: the conjugate {torch.equal(found, back)}")
    assert torch.equal(found, back)
try:
    save({"back": turn.mH})
    raise AssertionError
except ValueError as problem:
    print(".mH:", str(problem)[:60], "...")

# What the loss does: a vector turned forth and back by the stored turns is another one.
vector = torch.view_as_complex(torch.randn(4, 4, 2, generator=torch.Generator().manual_seed(0)))
moved = (vector * turn * load(save({"back": back}))["back"] - vector).abs().max()
assert (vector * turn * back - vector).abs().max() < 1e-6
print(f"turned forth and back, a vector moves by {moved:.2f}")
assert moved > 0.5
EOF_PYTHON
