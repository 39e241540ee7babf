"""GGUF files in llama.cpp, against the checkpoint in float32.

A file of type F32 has the same weights in float32, and llama.cpp computes with them in float32: only the
order of sums differs. With the other types it rounds the inputs of every product to 8 bits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers

import harness
from harness.export.gguf import export_gguf
from harness.export.gguf_types import TERNARY, pack
from harness.export.source import AS_IT_IS, Rounding
from tests.harness.export.checkpoints import WIDE, byte_level, without_shift, write
from tests.harness.export.test_gguf_types import COLUMNS, exact, matrix
from tests.runtimes import models

llama_cpp = pytest.importorskip("tests.runtimes.llama_cpp", exc_type=ImportError)

VOCABULARY = WIDE["vocab_size"]
PROMPT = list(range(20, 60))

# Of log-probabilities, whose standard deviation is 0.3 here; a tenth of this was measured.
FLOAT32 = 2e-5
# ggml looks GELU up in a table of float16.
GELU = 4e-3
# Inputs of all products in 8 bits: 0.03 to 0.04 was measured, 2 to 3 % of the standard deviation on average.
EIGHT_BITS = 0.08


def difference(folder: Path, file: Path, prompt: list[int] = PROMPT, context: int = 256) -> float:
    """Largest difference of the log-probabilities of all tokens, while llama.cpp continues a prompt."""
    continued, got = llama_cpp.LlamaCpp(file, context).greedy(prompt, VOCABULARY)
    expected = llama_cpp.log_probabilities(harness.load(folder), prompt, continued)
    assert expected.std() > 0.2
    return float(np.abs(got - expected).max())


@pytest.mark.parametrize("name", [*models.CONFIGS, *models.LLAMA_CPP])
def test_every_architecture_computes_what_the_checkpoint_does(name: str, tmp_path: Path) -> None:
    folder, file = write(tmp_path / "checkpoint", (models.CONFIGS | models.LLAMA_CPP)[name]()), tmp_path / "a"
    export_gguf(folder, file, kind="F32")
    assert difference(folder, file) < (GELU if name.startswith("gemma3") else FLOAT32)


def test_long_factors_serve_long_contexts(tmp_path: Path) -> None:
    folder, file = write(tmp_path / "checkpoint", models.LLAMA_CPP["phi3, longrope"]()), tmp_path / "a.gguf"
    export_gguf(folder, file, kind="F32")
    prompt = [20 + i * i % 300 for i in range(390)]
    assert difference(folder, file, prompt, context=768) < FLOAT32


@pytest.mark.parametrize(
    "config", [transformers.MistralConfig, transformers.Phi3Config], ids=["mistral", "phi3"]
)
def test_a_window_becomes_the_context_where_llama_cpp_has_no_windows(config: type, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", config(**WIDE, sliding_window=16))
    exported = export_gguf(folder, tmp_path / "a.gguf", kind="F32")
    assert "the file states a context of 16 tokens" in exported.notes[-1]
    assert difference(folder, tmp_path / "a.gguf", PROMPT[:4]) < FLOAT32


@pytest.mark.parametrize("name", ["llama", "mixtral, all experts"])
@pytest.mark.parametrize("kind", TERNARY)
def test_every_type_costs_no_more_than_rounding_inputs_to_8_bits(
    kind: str, name: str, tmp_path: Path
) -> None:
    change = (lambda scale, shift: None) if TERNARY[kind].shift else without_shift
    config = (models.CONFIGS | models.LLAMA_CPP)[name]()
    folder = write(tmp_path / "checkpoint", config, block_size=256, change=change)
    export_gguf(folder, tmp_path / "dense.gguf", kind="F32")
    export_gguf(folder, tmp_path / "packed.gguf", kind=kind)
    assert difference(folder, tmp_path / "dense.gguf") < FLOAT32
    assert 100 * FLOAT32 < difference(folder, tmp_path / "packed.gguf") < EIGHT_BITS


@pytest.mark.parametrize("kind", TERNARY)
def test_ggml_decodes_every_type_to_the_same_numbers(kind: str) -> None:
    held = matrix(256, symmetric=not TERNARY[kind].shift)
    got = llama_cpp.decode(kind, pack(held, kind, "m", Rounding()), COLUMNS)
    error = np.abs(got - exact(held)).max()
    assert error < 2.0**-8 if TERNARY[kind].shift else error == 0


@pytest.mark.parametrize("embedding", [AS_IT_IS, "F16", "Q8_0", "Q6_K"])
def test_embedding_and_head_may_be_rounded(embedding: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", models.CONFIGS["llama"]())
    export_gguf(folder, tmp_path / "a.gguf", kind="F32", embedding=embedding)
    allowed = {AS_IT_IS: FLOAT32, "F16": 2e-3, "Q8_0": EIGHT_BITS, "Q6_K": EIGHT_BITS}
    assert difference(folder, tmp_path / "a.gguf") < allowed[embedding]


def test_the_text_that_follows_is_the_checkpoint_s(tmp_path: Path) -> None:
    """From text to text, so the tokenizers agree too. Rounded inputs would decide between near ties."""
    tokenizer = byte_level()
    folder = write(tmp_path / "checkpoint", models.CONFIGS["qwen3"](), tokenizer)
    export_gguf(folder, tmp_path / "a.gguf", kind="F32")
    model, words = harness.load(folder), "They're here in 1984, foxes jump: it's 3.14"
    tokens = tokenizer(words, return_tensors="pt").input_ids
    ours = model.generate(tokens, max_new_tokens=16, do_sample=False)[0, tokens.shape[1] :]
    assert llama_cpp.LlamaCpp(tmp_path / "a.gguf").text(words, 16) == tokenizer.decode(ours)
