#!/usr/bin/env bash
# transformers 5.23.0: TextStreamer prints the code of a Llama 2 with a space too few on each line.
#
# TextStreamer prints the text of generate() as it comes, and one would expect it to print what decode() gives
# in the end. After each line break it forgets the tokens so far and decodes what follows as a new text. The
# decoder of tokenizers of the Llama 2 kind removes one space at the start of a text, as they put one there.
# So an indentation of four spaces is printed as three, after each line break but not in the first line.
# TextIteratorStreamer does the same. tokenizers.DecodeStream, which is made for this, keeps all of them.
#
# It matters to those who stream the answers of such a model: code is shown and copied with another
# indentation than the model wrote, and a difference between a quantized model and its original may be one of
# printing alone. tokenizer.decode of all tokens gives the text.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 tokenizers==0.23.3 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
import contextlib
import io
from importlib.metadata import version

import torch
from tokenizers.decoders import DecodeStream
from transformers import LlamaTokenizer, TextIteratorStreamer, TextStreamer

print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "▁▁▁", "▁def", "▁return", "▁f", "▁1", "():"]
tokenizer = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
answer = ["▁def", "▁f", "():", "<0x0A>", "▁▁▁", "▁return", "▁1", "<0x0A>", "▁def", "▁f"]
ids = tokenizer.convert_tokens_to_ids(answer)

decoded = tokenizer.decode(ids)
stream = DecodeStream([])
stepwise = "".join(stream.step(tokenizer.backend_tokenizer, i) or "" for i in ids)
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    streamer = TextStreamer(tokenizer)
    for i in ids:
        streamer.put(torch.tensor([i]))
    streamer.end()
streamer = TextIteratorStreamer(tokenizer)
for i in ids:
    streamer.put(torch.tensor([i]))
streamer.end()
iterated = "".join(streamer)
print("decode              ", repr(decoded))
print("DecodeStream        ", repr(stepwise))
print("TextStreamer        ", repr(printed.getvalue()))
print("TextIteratorStreamer", repr(iterated))
assert decoded == stepwise == "def f():\n    return 1\n def f"
assert printed.getvalue() == "def f():\n   return 1\ndef f\n"  # print ends the last line
assert iterated == "def f():\n   return 1\ndef f"
EOF_PYTHON
