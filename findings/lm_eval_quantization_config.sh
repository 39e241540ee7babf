#!/usr/bin/env bash
# lm_eval 0.4.13 refuses a model that transformers loads, and even a loaded one, for a note in its config.
#
# A checkpoint may say in quantization_config how its weights were made, by a method that transformers 5.23.0
# does not know. AutoModelForCausalLM warns that it skips the quantization and loads every weight as stored.
# One would expect HFLM, which is --model hf, to load what AutoModelForCausalLM loads, and to take a model
# that is in memory as it is. It turns the dict of the config into an object of transformers first and
# passes that back as an argument. For arguments an unknown method is an error. So HFLM raises "Unknown
# quantization type" for the folder, and for a loaded model too, where the object would not even be used.
#
# It matters to those who evaluate a checkpoint of rounded weights, or a model of a library that quantizes by
# itself: lm_eval fails where generate() works. Deleting config.quantization_config after loading avoids
# it, and the scores are those of the model.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HOME="$tmp/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check accelerate==1.15.0 lm_eval==0.4.13 numpy==2.4.6 tokenizers==0.23.3 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
import json
import logging
from importlib.metadata import version
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
transformers_logging.disable_default_handler()
transformers_logging.disable_progress_bar()

print("lm_eval", version("lm_eval"), "transformers", version("transformers"))
words = ["<s>", "a", "b", "c"]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")
config = LlamaConfig(
    vocab_size=len(words),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    bos_token_id=0,
    eos_token_id=0,
)
original = LlamaForCausalLM(config).eval()
original.save_pretrained("model")
tokenizer.save_pretrained("model")
note = {"quant_method": "rounded", "bits": 4}
file = Path("model/config.json")
file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": note}))

model = AutoModelForCausalLM.from_pretrained("model")
kept = all(torch.equal(value, model.state_dict()[name]) for name, value in original.state_dict().items())
print(f"AutoModelForCausalLM: all weights as stored: {kept}")
for message in said:
    print(f"  warning: {message.partition(' - ')[0]} ... {message.split('. ')[-2]}")
assert kept and len(said) == 1

for what, pretrained, given in (("folder", "model", None), ("loaded model", model, tokenizer)):
    try:
        HFLM(pretrained, tokenizer=given, device="cpu")
    except ValueError as error:
        print(f"HFLM of the {what}: ValueError: {str(error).partition(' - ')[0]}")
        assert "Unknown quantization type, got rounded" in str(error)
    else:
        raise AssertionError(f"HFLM takes the {what}")

del model.config.quantization_config
evaluated = HFLM(model, tokenizer=tokenizer)
request = Instance("loglikelihood", doc={}, arguments=("a b", " c a"), idx=0)
[(score, _)] = evaluated.loglikelihood([request], disable_tqdm=True)
with torch.no_grad():
    log_probabilities = original(torch.tensor([[1, 2, 3, 1]])).logits[0].log_softmax(-1)
by_hand = (log_probabilities[1, 3] + log_probabilities[2, 1]).item()
print(f"HFLM of the loaded model without the note: log-likelihood {score:.4f}, by hand {by_hand:.4f}")
assert abs(score - by_hand) < 1e-4
EOF_PYTHON
