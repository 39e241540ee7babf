"""Small random models with a decoder inside: of images and text, and with labels at their end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.harness import tiny

IMAGE = 95  # the token that stands for a piece of an image
# Larger than the decoders.
VISION = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_TEXT = {**tiny._GROUPED, "num_hidden_layers": 2, "max_position_embeddings": 128}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": 94,
    "vision_start_token_id": 93,
    "vision_end_token_id": 92,
}
_PATCHES = {"depth": 3, "patch_size": 14, "num_heads": 4}


def _with_vision(kind: str) -> Any:
    if kind == "llava":
        return transformers.LlavaConfig(
            text_config={"model_type": "llama", **_TEXT},
            vision_config={"model_type": "clip_vision_model", **VISION},
            image_token_index=IMAGE,
        )
    if kind == "qwen2_vl":
        return transformers.Qwen2VLConfig(
            text_config={**_TEXT, "rope_parameters": _MROPE},
            vision_config={**_PATCHES, "embed_dim": 256, "hidden_size": tiny.WIDTH},
            **_QWEN,
        )
    if kind == "qwen3_vl":
        return transformers.Qwen3VLConfig(
            text_config={**_TEXT, "head_dim": 32, "rope_parameters": _MROPE},
            vision_config={
                **_PATCHES,
                "hidden_size": 256,
                "intermediate_size": 512,
                "out_hidden_size": tiny.WIDTH,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            **_QWEN,
        )
    if kind == "paligemma":
        return transformers.PaliGemmaConfig(
            text_config={"model_type": "gemma", **_TEXT, "head_dim": 32},
            vision_config={"model_type": "siglip_vision_model", **VISION, "projection_dim": tiny.WIDTH},
            image_token_index=IMAGE,
            projection_dim=tiny.WIDTH,
            hidden_size=tiny.WIDTH,
        )
    if kind == "idefics3":
        return transformers.Idefics3Config(
            text_config={"model_type": "llama", **_TEXT},
            vision_config=VISION,
            image_token_id=IMAGE,
            scale_factor=2,
        )
    if kind == "git":
        shape = {name: size for name, size in _TEXT.items() if name != "num_key_value_heads"}
        return transformers.GitConfig(vision_config=VISION, **shape)
    if kind == "mllama":
        return transformers.MllamaConfig(
            text_config={**_TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]},
            vision_config={
                **{name: size for name, size in VISION.items() if name != "num_attention_heads"},
                "attention_heads": 4,
                "num_global_layers": 1,
                "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 3 * VISION["hidden_size"],
            },
            image_token_index=IMAGE,
        )
    assert kind in ("gemma3", "shieldgemma2")
    config: Any = transformers.ShieldGemma2Config if kind == "shieldgemma2" else transformers.Gemma3Config
    return config(
        text_config=tiny.CONFIGS["gemma3"]().to_dict(),
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=94,
        eoi_token_index=93,
    )


# Where the decoder layers are.
WITH_VISION = {
    **dict.fromkeys(
        ("llava", "qwen2_vl", "qwen3_vl", "paligemma", "gemma3", "mllama"), "model.language_model.layers"
    ),
    "idefics3": "model.text_model.layers",
    "git": "git.encoder.layer",
}
GUARDED = "model.model.language_model.layers"
CLASSIFIERS: dict[str, Any] = {
    "llama": transformers.LlamaForSequenceClassification,
    "qwen3": transformers.Qwen3ForTokenClassification,
}


def with_vision(kind: str, ternary: bool = False) -> Any:
    """A random model of images and text; with `ternary`, every matrix of its decoder on a grid."""
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForImageTextToText
    model = auto.from_config(_with_vision(kind), dtype=torch.bfloat16).eval()
    if kind == "mllama":
        _open_gates(model)
    return _on_grid(model, WITH_VISION[kind]) if ternary else model


@torch.no_grad()
def _open_gates(model: Any) -> None:
    """Let images matter: at the start of training, their gates are shut."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            parameter.fill_(1)


def guard() -> Any:
    """ShieldGemma 2, which answers whether an image breaks a rule; its decoder on a grid."""
    torch.manual_seed(0)
    config = _with_vision("shieldgemma2")
    config.yes_token_index, config.no_token_index = 5, 7
    model = transformers.ShieldGemma2ForImageClassification(config).to(torch.bfloat16).eval()
    return _on_grid(model, GUARDED)


def classifier(kind: str, ternary: bool = False, labels: int = 3) -> Any:
    """A random model with labels at its end."""
    torch.manual_seed(0)
    config = tiny.CONFIGS[kind]()
    config.num_labels = labels
    model = CLASSIFIERS[kind](config).to(torch.bfloat16).eval()
    nn.init.normal_(model.score.weight)
    return _on_grid(model, "model.layers") if ternary else model


def saved(model: Any, folder: Path) -> Any:
    """Write a model with a tokenizer, and read it: transformers then computes its tables in float32."""
    tiny.save(model, folder)
    return type(model).from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def _on_grid(model: Any, prefix: str) -> Any:
    torch.manual_seed(3)  # with others, one of all rows may be too lopsided for the fit to find its grid
    for module in model.get_submodule(prefix).modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(tiny.on_grid(*module.weight.shape))
    return model


def with_image(kind: str) -> dict[str, torch.Tensor]:
    """Inputs of a model of images and text, with an image among the tokens."""
    generator = torch.Generator().manual_seed(0)
    if kind == "qwen2_vl":  # two by two patches make one token
        patches = torch.randn(4, 3 * 2 * 14 * 14, generator=generator).bfloat16()
        return {
            "input_ids": torch.tensor([[3, 93, IMAGE, 92, 11, 5, 7]]),
            "mm_token_type_ids": torch.tensor([[0, 0, 1, 0, 0, 0, 0]]),
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
        }
    if kind == "mllama":  # one tile of four
        return {
            "input_ids": torch.tensor([[3, IMAGE, 11, 5, 7]]),
            "pixel_values": torch.randn(1, 1, 4, 3, 28, 28, generator=generator).bfloat16(),
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
            "cross_attention_mask": torch.tensor([1, 0, 0, 0]).expand(1, 5, 1, 4),
        }
    inputs = {
        "input_ids": torch.tensor([[3, *[IMAGE] * 4, 11, 5, 7]]),
        "pixel_values": torch.randn(1, 3, 28, 28, generator=generator).bfloat16(),
    }
    if kind in ("gemma3", "shieldgemma2"):  # its images are read in both directions
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs
