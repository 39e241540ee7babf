#!/usr/bin/env bash
# transformers 5.23.0: generate(stop_strings=...) needs a tokenizer that can write "abcdef".
#
# A stop string ends the text where it occurs, and one would expect any string to do that the tokenizer can
# write. To learn what each token looks like inside a text, transformers decodes it after the tokens of the
# text "abcdef" and cuts off what comes before it. A vocabulary of capital letters, as protein and DNA models
# have, makes unknown tokens of that text. Then "abcdef" is not found again, and generate raises "ValueError:
# substring not found", which names neither the stop string nor the tokenizer. One letter too few is enough. A
# normalizer that makes capitals of all letters has the same effect, with a to z in the vocabulary or not.
#
# It matters to those who let a model of sequences, chess moves or numbers stop at a motif, and to those who
# test generation with a small vocabulary of their own. A StoppingCriteria that decodes the text avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 tokenizers==0.23.3 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

logging.set_verbosity_error()
print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def make(alphabet, upper=False):
    """A tokenizer of single letters."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<end>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if upper:
        tokenizer.normalizer = normalizers.Replace("a", "A")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


for name, tokenizer, raises in (
    ("amino acids", make(AMINO_ACIDS), True),
    ("amino acids and a to e", make(AMINO_ACIDS + "abcde"), True),
    ("amino acids and a to f", make(AMINO_ACIDS + "abcdef"), False),
    ("amino acids, a to f, a written as A", make(AMINO_ACIDS + "abcdef", upper=True), True),
):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, **size)
    model = LlamaForCausalLM(config).eval()
    prompt = tokenizer("MKTAYIAKQR", return_tensors="pt")["input_ids"]
    how = {"do_sample": False, "max_new_tokens": 20, "suppress_tokens": [0, 1], "tokenizer": tokenizer}
    text = tokenizer.decode(model.generate(prompt, **how)[0, prompt.shape[1] :])
    stop = text[5:8]
    assert len(text) == 20 and tokenizer.decode(tokenizer(stop)["input_ids"]) == stop
    try:
        found = tokenizer.decode(model.generate(prompt, stop_strings=stop, **how)[0, prompt.shape[1] :])
        assert found == text[: text.index(stop) + 3]
        print(f"{name}: {text}, stopped at {stop}: {found}")
        assert not raises
    except ValueError as problem:
        print(f"{name}: {text}, stopped at {stop}: {problem!r}")
        assert raises and str(problem) == "substring not found"
EOF_PYTHON
