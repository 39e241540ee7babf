"""python -m harness.quantize on models whose decoder is inside another one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import harness
import harness.hf
from harness.cli import EXIT_USAGE
from harness.compare import main as compare_main
from harness.evaluate import main as evaluate_main
from harness.export.__main__ import main as export_main
from harness.generate.__main__ import main as generate_main
from harness.inspect import main as inspect_main
from harness.models.folder import PROCESSOR, REPORT
from harness.quantize.__main__ import main as quantize_main
from harness.ternary.reading import tensors_of
from tests.harness import tiny, wrappers
from tests.harness.conftest import SMALL
from tests.harness.quantize.stopping import files_of, stopped_after

Run = Callable[..., int]
TEXT = torch.tensor([[3, 7, 11, 5, 4, 90, 8]])
IMAGE_CLASS: Any = transformers.AutoModelForImageTextToText


def command(source: Path, out: Path, text: Path, *more: Any) -> list[Any]:
    return [source, "--out", out, "--calibration", text, "--block-size", tiny.BLOCK, *SMALL, *more]


def _processor() -> Any:
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(f"w{wrappers.IMAGE}", special_tokens=True)  # found without spaces around it
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=f"w{wrappers.IMAGE}",
        chat_template="w3{% for message in messages %} {{ message['content'] }}{% endfor %}",
    )


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "gemma3", "mllama"])
def ternarized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of images and text on a ternary grid, its folder, and its checkpoint. Not to be changed."""
    folder = tmp_path_factory.mktemp(request.param)
    text = folder / "words.txt"
    text.write_text(tiny.words(400))
    model = wrappers.saved(wrappers.with_vision(request.param, ternary=True), folder / "original")
    if request.param == "llava":
        _processor().save_pretrained(folder / "original")
    else:
        for name in PROCESSOR:
            (folder / "original" / name).write_text(json.dumps({"of": name}))
    with pytest.MonkeyPatch.context() as patch:
        arguments = command(folder / "original", folder / "out", text, "--reorder", "none")
        patch.setattr("sys.argv", ["quantize", *map(str, arguments)])
        assert quantize_main() == 0
    return request.param, model, folder


def test_the_decoder_comes_back_as_it_was_and_the_rest_is_left(ternarized: Any) -> None:
    kind, model, folder = ternarized
    stored = dict(tensors_of(folder / "out"))
    packed = {name.removesuffix(".trits") for name in stored if name.endswith(".trits")}
    prefix = wrappers.WITH_VISION[kind]
    layers = model.get_submodule(prefix)
    if kind == "mllama":  # text skips the second layer
        layers = {"0": layers[0], "2": layers[2]}
    else:
        layers = {str(index): layer for index, layer in enumerate(layers)}
    assert packed == {
        f"{prefix}.{index}.{name}"
        for index, layer in layers.items()
        for name, part in layer.named_modules()
        if isinstance(part, torch.nn.Linear)
    }
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in packed and name not in model.all_tied_weights_keys:
            assert torch.equal(stored[name], tensor), name
    loaded = harness.load(folder / "out", dense=True)
    assert type(loaded) is type(model)
    for inputs in ({"input_ids": TEXT}, wrappers.with_image(kind)):
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_transformers_loads_and_saves_it_bit_for_bit(ternarized: Any, tmp_path: Path) -> None:
    kind, model, folder = ternarized
    loaded = IMAGE_CLASS.from_pretrained(folder / "out")
    assert type(loaded) is type(model)
    loaded.save_pretrained(tmp_path / "again")
    stored, again = (dict(tensors_of(where)) for where in (folder / "out", tmp_path / "again"))
    assert stored.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    loaded.dequantize().save_pretrained(tmp_path / "plain")
    plain = IMAGE_CLASS.from_pretrained(tmp_path / "plain", dtype="auto")
    for inputs in ({"input_ids": TEXT}, wrappers.with_image(kind)):
        assert torch.equal(plain(**inputs).logits, model(**inputs).logits)


def test_the_files_of_its_processor_are_copied(ternarized: Any) -> None:
    kind, _, folder = ternarized
    found = [name for name in PROCESSOR if (folder / "original" / name).exists()]
    assert found == (["processor_config.json"] if kind == "llava" else list(PROCESSOR))
    for name in found:
        assert (folder / "out" / name).read_bytes() == (folder / "original" / name).read_bytes()


@pytest.mark.parametrize("ternarized", ["llava"], indirect=True)
def test_its_processor_is_loaded_from_the_checkpoint(ternarized: Any) -> None:
    _, model, folder = ternarized
    loaded = transformers.AutoProcessor.from_pretrained(folder / "out")
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    message = [{"role": "user", "content": f"w{wrappers.IMAGE} w11"}]
    outputs = []
    for processor, reader in ((_processor(), model), (loaded, harness.load(folder / "out", dense=True))):
        text = processor.apply_chat_template(message)
        inputs = processor(images=image, text=text, return_tensors="pt").to(torch.bfloat16)
        assert inputs["input_ids"].tolist() == [[3, *[wrappers.IMAGE] * 4, 11]]
        outputs.append(reader(**inputs).logits)
    assert torch.equal(*outputs)


def test_it_is_read_layer_by_layer_by_the_names_of_its_files(
    ternarized: Any, tmp_path: Path, run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers writes the names that the first version of an architecture had."""
    kind, _, folder = ternarized
    names = dict(tensors_of(folder / "original"))
    assert any("layers.0.self_attn" in name for name in names)
    assert not any(name.startswith(wrappers.WITH_VISION[kind]) for name in names)
    monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    text = folder / "words.txt"
    assert (
        run_main(quantize_main, *command(folder / "original", tmp_path, text, "--force", "--reorder", "none"))
        == 0
    )
    for file in sorted((folder / "out").glob("model*")):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("ternarized", ["qwen2_vl"], indirect=True)
def test_programs_take_it(ternarized: Any, run_main: Run, capsys: pytest.CaptureFixture[str]) -> None:
    kind, model, folder = ternarized
    out, text = folder / "out", ("--data", folder / "words.txt", "--seqlen", 24, "--windows", 2)
    assert run_main(inspect_main, out) == 0
    assert f"{wrappers.WITH_VISION[kind]}.0.self_attn.q_proj" in capsys.readouterr().out
    assert run_main(compare_main, out, out, "--original", folder / "original", *text) == 0
    shown = capsys.readouterr().out
    assert "same most likely token or label  100.0%" in shown
    assert re.search(r"^predictions compared +46 +46$", shown, re.MULTILINE)  # 23 of each window
    assert run_main(generate_main, out, "--dense", "--prompt", "w3 w7 w11", "--tokens", 5) == 0
    written = capsys.readouterr().out.split()
    ids = model.generate(torch.tensor([[3, 7, 11]]), max_new_tokens=5, do_sample=False)[0, 3:]
    assert written == [f"w{i}" for i in ids.tolist() if i > 2]
    assert run_main(export_main, out, "--format", "gguf", "--out", folder / "model.gguf") == EXIT_USAGE
    assert f"gguf export does not support {kind} models" in capsys.readouterr().err.replace("GGUF", "gguf")


def test_perplexity_is_that_of_transformers(
    words_file: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """PaliGemma reads text as an answer: in both directions it would see what it is to predict."""
    source = tmp_path / "original"
    model = wrappers.saved(wrappers.with_vision("paligemma"), source)
    evaluation = ("--data", words_file, "--seqlen", 24, "--windows", 2, "--bos", "as-tokenized", "--json")
    assert run_main(evaluate_main, source, *evaluation) == 0
    found = json.loads(capsys.readouterr().out)["value"]
    ids = torch.tensor(tiny.make_tokenizer()(words_file.read_text())["input_ids"])[:48].reshape(2, 24)
    losses = [
        model(input_ids=window[None], token_type_ids=torch.ones(1, 24).long(), labels=window[None]).loss
        for window in ids
    ]
    assert found == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-2)
    assert run_main(quantize_main, *command(source, tmp_path / "out", words_file)) == 0


def test_one_that_was_stopped_goes_on_to_the_same_bytes(
    words_file: Path, tmp_path: Path, run_main: Run
) -> None:
    source = tiny.save(wrappers.with_vision("qwen3_vl"), tmp_path / "original")
    best = ("--recipe", "best", "--backend", "cpu")
    stopped_after(1, run_main, *command(source, tmp_path / "out", words_file, *best))
    assert run_main(quantize_main, *command(source, tmp_path / "out", words_file, *best, "--resume")) == 0
    assert run_main(quantize_main, *command(source, tmp_path / "whole", words_file, *best)) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", wrappers.CLASSIFIERS)
def test_a_classifier_keeps_its_head_and_its_class(
    kind: str, words_file: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "original", tmp_path / "out"
    model = wrappers.saved(wrappers.classifier(kind, ternary=True), source)
    more = ("--eval", words_file, "--eval-seqlen", 24, "--reorder", "none")
    assert run_main(quantize_main, *command(source, out, words_file, *more)) == 0
    assert "a classification head has no perplexity" in capsys.readouterr().out
    assert json.loads((out / REPORT).read_text())["perplexity"] == {}
    loaded = harness.load(out, dense=True)
    assert type(loaded) is type(model)
    assert torch.equal(loaded.score.weight, model.score.weight)
    assert torch.equal(loaded(TEXT).logits, model(TEXT).logits)
    auto = {
        "llama": transformers.AutoModelForSequenceClassification,
        "qwen3": transformers.AutoModelForTokenClassification,
    }[kind]
    assert type(auto.from_pretrained(out)) is type(model)
    for main, arguments, reason in (
        (generate_main, [out, "--prompt", "w3"], "cannot generate text"),
        (evaluate_main, [out, "--data", words_file, "--seqlen", 24], "has no perplexity"),
        (export_main, [out, "--format", "gguf", "--out", tmp_path / "m.gguf"], "head of"),
    ):
        assert run_main(main, *arguments) == EXIT_USAGE
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("kind", wrappers.CLASSIFIERS)
def test_the_divergence_of_labels_is_measured(
    kind: str, words_file: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "original", tmp_path / "out"
    model = wrappers.saved(wrappers.classifier(kind), source)
    assert run_main(quantize_main, *command(source, out, words_file)) == 0
    capsys.readouterr()
    text = ("--data", words_file, "--seqlen", 24, "--windows", 3, "--json")
    assert run_main(evaluate_main, out, "--original", source, *text) == 0
    printed = json.loads(capsys.readouterr().out)
    found = printed["divergence"]
    ids = torch.tensor(tiny.make_tokenizer()(words_file.read_text())["input_ids"])[: 3 * 24].reshape(3, 24)
    quantized = harness.load(out, dense=True)
    logits = [torch.cat([of(window[None]).logits for window in ids]) for of in (model, quantized)]
    expected, got = (part.flatten(0, -2).float().log_softmax(-1) for part in logits)
    kl = torch.nn.functional.kl_div(got, expected, reduction="batchmean", log_target=True).item()
    assert kl > 0
    assert found["mean"] == pytest.approx(kl, rel=1e-4)
    assert found["tokens"] == len(expected) == (3 if kind == "llama" else 72)
    assert "value" not in printed


def test_a_classifier_of_images_that_reads_text_keeps_its_class(
    words_file: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "original", tmp_path / "out"
    model = wrappers.saved(wrappers.guard(), source)
    assert run_main(quantize_main, *command(source, out, words_file, "--reorder", "none")) == 0
    stored = dict(tensors_of(out))
    assert len([name for name in stored if name.endswith(".trits")]) == 3 * 7
    loaded = harness.load(out, dense=True)
    again = transformers.AutoModelForImageClassification.from_pretrained(out)
    again.save_pretrained(tmp_path / "again")
    saved = dict(tensors_of(tmp_path / "again"))
    assert stored.keys() == saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in stored.items())
    for inputs in ({"input_ids": TEXT}, wrappers.with_image("shieldgemma2")):
        expected = model(**inputs)
        assert expected.logits.shape == (1, 2)
        assert type(loaded) is type(again) is type(model)
        assert torch.equal(loaded(**inputs).probabilities, expected.probabilities)
    capsys.readouterr()
    text = ("--data", words_file, "--seqlen", 24, "--windows", 2, "--json")
    assert run_main(evaluate_main, out, "--original", source, *text) == 0
    divergence = json.loads(capsys.readouterr().out)["divergence"]
    assert (divergence["mean"], divergence["tokens"]) == (0, 2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
            ),
            "is T5ForConditionalGeneration, an encoder-decoder",
        ),
        (
            lambda: transformers.BertForMaskedLM(
                transformers.BertConfig(
                    vocab_size=96,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=1,
                    num_attention_heads=4,
                )
            ),
            "the model is not a causal language model",
        ),
        (
            lambda: transformers.DistilBertForSequenceClassification(
                transformers.DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_layers=1, n_heads=4)
            ),
            "the model is not a causal language model",
        ),
        (
            lambda: transformers.DistilBertForMaskedLM(
                transformers.DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_layers=1, n_heads=4)
            ),
            "is DistilBertForMaskedLM, which cannot be used; only decoder-only language models",
        ),
        (
            lambda: transformers.ViTForImageClassification(
                transformers.ViTConfig(
                    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
                )
            ),
            "is ViTForImageClassification, which cannot be used",
        ),
        (
            lambda: transformers.LlamaForQuestionAnswering(tiny.CONFIGS["llama"]()),
            "is LlamaForQuestionAnswering, which cannot be used",
        ),
    ],
)
def test_encoders_and_other_heads_are_refused_in_words(
    make: Callable[[], Any],
    reason: str,
    words_file: Path,
    tmp_path: Path,
    run_main: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tiny.save(make(), tmp_path / "original")
    assert run_main(quantize_main, *command(source, tmp_path / "out", words_file)) == EXIT_USAGE
    error = capsys.readouterr().err
    assert reason in error
    assert "Traceback" not in error
