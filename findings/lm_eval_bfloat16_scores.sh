#!/usr/bin/env bash
# lm_eval 0.4.13 adds up the scores of a bfloat16 model in bfloat16, so different answers get equal scores.
#
# Multiple-choice tasks such as HellaSwag compare the log-likelihoods of whole sentences. One would expect
# them to be as exact as the model's logits allow. By default HFLM computes log_softmax, and the sum over the
# tokens of a continuation, in the model's own dtype. In bfloat16, a sum of 64 to 128 nats is a multiple of
# 0.5, whatever the logits are: answers that differ by less tie, and the first of them wins. Below, 100
# answers between -94.8 and -91.0 get 8 different scores.
#
# It matters to those who compare a model with its quantized version, where differences are small: most hub
# models load as bfloat16, and --model hf does not ask for more. softmax_dtype="float32" (in --model_args too)
# keeps the same logits and gives scores that are right to a thousandth.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HOME="$tmp/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check accelerate==1.15.0 lm_eval==0.4.13 numpy==2.4.6 tokenizers==0.23.3 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
import random
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("lm_eval", version("lm_eval"), "torch", version("torch"))
words = ["<s>", *(f"w{i}" for i in range(99))]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(words),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    bos_token_id=0,
    eos_token_id=0,
)
model = LlamaForCausalLM(config).eval().to(torch.bfloat16)

# 100 answers of 20 words to one question: about 20 * ln 100 = 92 nats each.
choose = random.Random(0)
answers = [" " + " ".join(f"w{choose.randrange(99)}" for _ in range(20)) for _ in range(100)]
requests = [
    Instance("loglikelihood", doc={}, arguments=("w1 w2 w3", answer), idx=i) for i, answer in enumerate(answers)
]


def exact(answer):
    """The sum of log-probabilities in float64, of the logits that the model computes in bfloat16."""
    ids = tokenizer("w1 w2 w3" + answer)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    return sum(logits.log_softmax(-1)[i - 1, ids[i]].item() for i in range(3, len(ids)))


right = [exact(answer) for answer in answers]
found = {}
for kind in (None, "float32"):
    evaluated = HFLM(model, tokenizer=tokenizer, batch_size=1, softmax_dtype=kind)
    scores = [score for score, _ in evaluated.loglikelihood(requests, disable_tqdm=True)]
    worst = max(abs(a - b) for a, b in zip(scores, right, strict=True))
    found[kind] = (len(set(scores)), worst, all(score % 0.5 == 0 for score in scores))
    print(
        f"softmax_dtype {kind}: {found[kind][0]} different scores of 100 answers between "
        f"{min(scores):.2f} and {max(scores):.2f}, wrong by up to {worst:.4f}"
    )
print(f"in float64: {len(set(right))} different scores between {min(right):.2f} and {max(right):.2f}")
assert len(set(right)) == 100
assert found[None][0] < 20 and found[None][1] > 0.25 and found[None][2]
assert found["float32"][0] == 100 and found["float32"][1] < 0.001 and not found["float32"][2]
EOF_PYTHON
