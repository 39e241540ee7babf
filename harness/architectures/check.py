"""Take a small model of one architecture through quantization, saving, loading and generation."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import harness
from harness.architectures.configs import VOCABULARY, small_config
from harness.compute import compute_for
from harness.errors import UserError
from harness.models.decoder import as_text
from harness.models.original import summary
from harness.quantize.options import NO_EVALUATION, Options
from harness.quantize.prepare import choose_backend, prepare, read_texts, take_all_windows
from harness.quantize.record import Record
from harness.quantize.run import quantize_layers
from harness.quantize.sink import sink_for
from harness.ternary.reading import tensors_of
from reference.types import TernaryConfig

DONE, REFUSED, NOT_BUILT, FAILED = "done", "refused", "not built", "failed"

# The tables that are walked: classes by type of model.
CAUSAL, VISION = "AutoModelForCausalLM", "AutoModelForImageTextToText"
TABLES = {CAUSAL: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, VISION: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}

# Models that another Auto class makes, and their class: of the class in the table, transformers writes names
# that it does not read.
OTHERS = {"shieldgemma2": ("AutoModelForImageClassification", "ShieldGemma2ForImageClassification")}

# Enough tokens for routers to choose every expert, few enough to be quick.
WINDOWS, SEQLEN = 2, 32

# More would take minutes; such a model has parts, such as a vision tower, that take no small sizes.
MOST_WEIGHTS = 20e6


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture.

    Attributes
    ----------
    model_type, class_name : str
        The architecture.
    outcome : {"done", "refused", "not built", "failed"}
        "not built": transformers cannot make, save, load or run the small model. "failed": an error that is
        not a refusal, or a model that is not the same when read back.
    reason : str
        Why it is not done.
    ternarized : float, optional
        Share of the weights of the decoder layers that are ternarized.
    left : str
        What was left as it is because it is not understood, or because text does not go through it.
    """

    model_type: str
    class_name: str
    outcome: str
    reason: str = ""
    ternarized: float | None = None
    left: str = ""


class Different(Exception):
    """A model that is not the same when it is read back."""


def check(model_type: str, auto: str = CAUSAL) -> Outcome:
    """Build a small model, quantize it, write it and read it back, and say what became of it.

    Parameters
    ----------
    model_type : str
        The type, of those in the table of `auto`.
    auto : {"AutoModelForCausalLM", "AutoModelForImageTextToText"}
        The Auto class of transformers that makes the model. All of them read text alone here.
    """
    name = TABLES[auto][model_type]
    auto, name = OTHERS.get(model_type, (auto, name if isinstance(name, str) else name[0]))
    with TemporaryDirectory() as folder:
        try:
            _build(model_type, auto, Path(folder) / "original")
        except Exception as error:  # transformers fails in many ways on sizes that it does not expect
            return Outcome(model_type, name, NOT_BUILT, _brief(error))
        try:
            share, left = _quantize(Path(folder))
        except UserError as error:
            return Outcome(model_type, name, REFUSED, _brief(error))
        except Exception as error:  # the point of the check is to find these
            return Outcome(model_type, name, FAILED, _brief(error))
    return Outcome(model_type, name, DONE, ternarized=share, left=left)


@torch.no_grad()
def _build(model_type: str, auto: str, folder: Path) -> None:
    """Write a small random model with a tokenizer, and run it once."""
    config = small_config(model_type)
    kind = getattr(transformers, auto)
    with torch.device("meta"):
        empty = kind.from_config(config)
    weights = sum(parameter.numel() for parameter in empty.parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"the smallest configuration found has {weights / 1e6:.0f} M weights")
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    ).save_pretrained(folder)
    loaded = kind.from_pretrained(folder, dtype="auto").eval()
    if not torch.isfinite(loaded(**as_text(loaded, _tokens()), use_cache=False).logits).all():
        raise ValueError("the logits of the small model are not finite")


@torch.no_grad()
def _quantize(folder: Path) -> tuple[float, str]:
    """Quantize a model, and compare what is read back with what calibration left in memory.

    Returns
    -------
    float, str
        Share of the decoder layers that is ternarized; what is left as it is.
    """
    generator = random.Random(0)
    words = " ".join(f"w{generator.randrange(3, VOCABULARY)}" for _ in range(4 * WINDOWS * SEQLEN))
    (folder / "words.txt").write_text(words)
    options = Options(
        model=str(folder / "original"),
        out=folder / "ternary",
        backend="cpu",
        calibration=str(folder / "words.txt"),
        evaluation=NO_EVALUATION,
        nsamples=WINDOWS,
        seqlen=SEQLEN,
        config=TernaryConfig(block_size=64),
    )
    sink = sink_for(options)
    sink.require_folder(_silent)
    backend = choose_backend(options, _silent)
    calibration, _ = read_texts(options, _silent)
    compute = compute_for(backend)
    ready = prepare(options, backend, compute, calibration, None, sink.settle)
    take_all_windows(ready, options, compute, _silent)
    record = Record.of(options, ready, calibration, None, sink.computed(ready, _silent))
    with sink.open(ready, record, _silent):
        quantize_layers(options, sink, ready, record, _silent)
        sink.finish(record)
    original = ready.original.model
    loaded = harness.load(folder / "ternary", dense=True)
    inputs = as_text(original, _tokens())
    found, expected = (model(**inputs, use_cache=False).logits for model in (loaded, original))
    _require_same("logits", found, expected)
    packed = harness.load(folder / "ternary")
    packed.save_pretrained(folder / "again")
    first, again = (dict(tensors_of(folder / name)) for name in ("ternary", "again"))
    if first.keys() != again.keys():
        raise Different(f"saved again, it has other tensors: {sorted(first.keys() ^ again.keys())[:3]}")
    for name, tensor in first.items():
        _require_same(name, again[name], tensor)
    found_tokens, expected_tokens = (_generated(model) for model in (loaded, original))
    if found_tokens != expected_tokens:
        raise Different(f"generates {found_tokens} instead of {expected_tokens}")
    left = "; ".join(filter(None, (ready.plan.not_understood, ready.plan.skipped)))
    return ready.plan.weights / ready.plan.layer_weights, left


def _generated(model: Any) -> str:
    """The tokens that a model continues a prompt with, or why it cannot."""
    try:
        return str(model.generate(_tokens()[:, :8], max_new_tokens=3, do_sample=False)[0, 8:].tolist())
    except Exception as error:  # some small originals cannot either
        return summary(error)


def _tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, SEQLEN), generator=torch.Generator().manual_seed(1))


def _require_same(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(found, expected):
        furthest = float((found.float() - expected.float()).abs().max())
        raise Different(f"{what} differ by up to {furthest:.2g} when read back")


def _brief(error: Exception) -> str:
    """An error in one line, without the paths of this machine."""
    text = str(error) if isinstance(error, UserError) else summary(error)
    return re.sub(r"\S*/tmp\w*", "", " ".join(text.split()))[:300]


def _silent(line: Any) -> None:
    """Print nothing."""
