#!/usr/bin/env bash
# gguf 0.19.0 leaves an empty list out of a file in silence, and llama.cpp then refuses the tokenizer.
#
# A byte-level BPE tokenizer without merges is a valid one: each byte is a token, as in byte and character
# models. One would expect add_token_merges([]) to write an empty array, which the format can hold. add_array
# returns without a word instead, and so does add_string for "". llama.cpp (xllamacpp 2026.10.11549) tells an
# empty list from none: for the file it says "cannot find tokenizer merges in model file". With an empty array
# put there by hand the same file loads and gives a token for each byte. GGUFReader reads that file too, but
# gguf-new-metadata, the program of the same package that copies files, stops with "Empty array".
#
# It matters to those who convert a tokenizer without merges, or test a converter with the smallest one there
# is: the call that should write the key is there, and the key is not. A list of one merge avoids the error.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check gguf==0.19.0 numpy==2.4.6 xllamacpp==2026.10.11549

cat > load.py <<'EOF_PYTHON'
import sys

import xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 128, 1, False, 3
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(settings)
answer = server.handle_completions({"prompt": "Hello", "max_tokens": 1, "logit_bias": [[40, 1000]]})
print(answer["usage"]["prompt_tokens"], "tokens")
EOF_PYTHON

cat > write.py <<'EOF_PYTHON'
import struct
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np

WIDTH = 64
KEY = "tokenizer.ggml.merges"
# GPT-2's alphabet: printable bytes are themselves, the others follow from code point 256 on.
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
tokens = [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]


def write(path, merges):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, "<end>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    writer.add_description("")
    writer.add_token_merges(merges)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (257, WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}"] = (WIDTH, WIDTH)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(*command):
    """Exit status, and all that a command prints."""
    command = [sys.executable, *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    return done.returncode, done.stdout.decode(errors="replace")


print("gguf", version("gguf"), "xllamacpp", version("xllamacpp"))
write("left-out.gguf", [])
write("unused.gguf", ["! !"])
fields = gguf.GGUFReader("left-out.gguf").fields
print(f"after add_token_merges([]): {KEY} in the file: {KEY in fields}, general.description: ", end="")
print("general.description" in fields)
assert KEY not in fields and "general.description" not in fields

# The same file with an empty array: the key, its type, the type of its items, their number 0. Tensors start
# at a multiple of 32.
data = Path("left-out.gguf").read_bytes()
reader = gguf.GGUFReader("left-out.gguf")
fields = [tensor.field for tensor in reader.tensors]
ends = (field.offset + sum(int(part.nbytes) for part in field.parts) for field in fields)
start, end = min(field.offset for field in fields), max(ends)
array, string = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
entry = struct.pack("<Q", len(KEY)) + KEY.encode() + struct.pack("<IIQ", array, string, 0)
count = struct.unpack_from("<Q", data, 16)[0]
header = data[:16] + struct.pack("<Q", count + 1) + data[24:start] + entry + data[start:end]
Path("empty.gguf").write_bytes(header + bytes(-len(header) % 32) + data[reader.data_offset :])
again = gguf.GGUFReader("empty.gguf")
assert again.fields[KEY].contents() == [] and len(again.tensors) == len(reader.tensors)
for one, other in zip(again.tensors, reader.tensors, strict=True):
    assert np.array_equal(one.data, other.data)

for name in ("left-out", "empty", "unused"):
    status, said = run("load.py", f"{name}.gguf")
    refused = "cannot find tokenizer merges in model file"
    print(f"llama.cpp, {name}.gguf:", refused if status else "loads, Hello is 5 tokens")
    if name == "left-out":
        assert status and refused in said
    else:
        assert not status and "5 tokens" in said
for name in ("unused", "empty"):
    files = (f"{name}.gguf", f"{name}-copy.gguf")
    copy = ("-m", "gguf.scripts.gguf_new_metadata", *files, "--general-name", "copy")
    status, said = run(*copy)
    problem = "Invalid GGUF metadata array. Empty array"
    print(f"gguf-new-metadata, {name}.gguf:", problem if problem in said else "copied")
    assert (status != 0) == (problem in said) == (name == "empty")
EOF_PYTHON
env/bin/python write.py
