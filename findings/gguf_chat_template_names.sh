#!/usr/bin/env bash
# gguf 0.19.0: a file with several chat templates has other bytes in every run.
#
# GGUFWriter keeps keys and tensors in the order in which they are added, so one would expect the same
# calls to write the same file. add_chat_template collects the names of templates in a set and stores
# list(set). Python salts the hashes of strings, so the names come in another order in another process.
#
# It matters to those who publish checksums of models, build reproducibly or deduplicate by content:
# the same conversion gives several files. Fixing PYTHONHASHSEED avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check gguf==0.19.0 numpy==2.4.6

cat > write.py <<'EOF_PYTHON'
import hashlib
from pathlib import Path

from gguf import GGUFReader, GGUFWriter

names = ["default", "tool_use", "rag", "code", "thinking"]
writer = GGUFWriter("model.gguf", "llama")
writer.add_chat_template([{"name": name, "template": f"{name}: {{{{ messages }}}}"} for name in names])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

digest = hashlib.sha256(Path("model.gguf").read_bytes()).hexdigest()
print(digest[:16], GGUFReader("model.gguf").get_field("tokenizer.chat_templates").contents())
EOF_PYTHON

env/bin/python -c 'from importlib.metadata import version; print("gguf", version("gguf"))'
for seed in 1 2 3 4; do
    PYTHONHASHSEED=$seed env/bin/python write.py
done | tee runs
digests=$(cut -d ' ' -f 1 runs | sort -u | wc -l)
echo "4 runs, $digests different files"
test "$digests" -gt 1
# The same seed gives the same file: nothing else differs between runs.
test "$(PYTHONHASHSEED=1 env/bin/python write.py)" = "$(head -n 1 runs)"
