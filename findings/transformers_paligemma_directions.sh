#!/usr/bin/env bash
# transformers 5.23.0: PaliGemma reads a text in both directions unless token_type_ids says otherwise.
#
# One would expect model(input_ids=ids) of a model that generates text to be causal: the logits of a token
# depend on this token and those before it. So it is in other models of images and text, such as Gemma 3.
# But PaliGemma takes a text without token_type_ids for a prompt, which it reads in both directions. Then every
# logit depends on all later tokens, also on the one that it predicts. The loss that the model returns for
# labels comes from these logits, and no warning says so. token_type_ids of ones make it causal. In Gemma 3 the
# same ones mean the opposite: an image, read in both directions.
#
# It matters to those who compute perplexity with one loop for all models: they pass input_ids alone,
# and the figure for PaliGemma is not one of prediction. A loop that always passes ones is wrong for Gemma 3.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HUB_OFFLINE=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0 torch==2.13.0 transformers==5.23.0

env/bin/python - <<'EOF_PYTHON'
from importlib.metadata import version

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

print("transformers", version("transformers"), "torch", version("torch"))
text = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
}
vision = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
torch.manual_seed(0)
paligemma = PaliGemmaForConditionalGeneration(
    PaliGemmaConfig(
        text_config={"model_type": "gemma", **text},
        vision_config={"projection_dim": 32, **vision},
        image_token_index=63,
        projection_dim=32,
        hidden_size=32,
    )
)
gemma3 = Gemma3ForConditionalGeneration(
    Gemma3Config(text_config=text, vision_config=vision, image_token_index=63, mm_tokens_per_image=4)
)

# Two texts of 12 tokens that differ in the last 6.
ids = torch.arange(1, 13)[None]
other = ids.clone()
other[:, 6:] += 20
found = {}
for model in (paligemma, gemma3):
    name = type(model).__name__
    model.eval()
    for kind in (None, 0, 1):
        given = {} if kind is None else {"token_type_ids": torch.full_like(ids, kind)}
        with torch.no_grad():
            one, two = (model(input_ids=tokens, **given).logits[:, :6] for tokens in (ids, other))
        change = (one - two).abs().max().item()
        found[model, kind] = change
        print(f"{name}, token_type_ids {kind}: later tokens change earlier logits by {change:.2g}")

with torch.no_grad():
    loss = paligemma(input_ids=ids, labels=ids).loss
    logits = [paligemma(input_ids=ids, token_type_ids=torch.full_like(ids, kind)).logits for kind in (0, 1)]
both, causal = (torch.nn.functional.cross_entropy(rows[0, :-1], ids[0, 1:]) for rows in logits)
print(f"loss of PaliGemma for labels: {loss:.6f}, in both directions: {both:.6f}, causal: {causal:.6f}")
assert found[paligemma, None] > 1e-3 and found[paligemma, 0] > 1e-3 and found[paligemma, 1] == 0
assert found[gemma3, None] == 0 and found[gemma3, 0] == 0 and found[gemma3, 1] > 1e-3
assert abs(loss - both) < 1e-6 and abs(loss - causal) > 1e-5
EOF_PYTHON
