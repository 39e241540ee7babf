"""From torch to the backend and back: exchange of arrays, Gram matrices, whole layers."""

import numpy as np
import pytest
import torch

from gpu.device import STANDIN, to_device, xp
from harness.backends import load_backend
from harness.benchmark.quantization import Scale, quantize_shape
from harness.calibration.capture import capture_inputs
from harness.calibration.gram import GramSum
from harness.calibration.layerwise import fit_layers
from harness.calibration.methods import ternarizer
from harness.compute import HOST, Compute, compute_for
from harness.models.decoder import find_decoder_layers
from harness.quantize.options import Options
from harness.quantize.run import quantize
from harness.ternary.format import packed_tensors
from harness.ternary.reading import tensors_of
from harness.verify.tolerances import OUTPUT_ERROR
from reference.packing import unpack_base3
from reference.types import TernaryConfig
from tests.harness import tiny


@pytest.fixture(scope="module")
def compute():
    return compute_for(load_backend("gpu"))


def address(array):
    return array.ctypes.data if STANDIN else array.data.ptr


def test_torch_and_the_backend_share_memory(compute):
    tensor = torch.arange(6.0, device=compute.device).reshape(2, 3)
    array = to_device(tensor)
    assert isinstance(array, xp.ndarray)
    assert address(array) == tensor.data_ptr()
    made = xp.arange(6.0)
    assert torch.from_dlpack(made).data_ptr() == address(made)


def test_work_is_queued_on_the_stream_of_torch(compute):
    if compute.device.type != "cuda":
        pytest.skip("the host has no streams")
    backend = load_backend("gpu", "float64")
    rng = np.random.default_rng(0)
    W = torch.from_numpy(rng.normal(size=(64, 300)))
    expected = backend.to_host(backend.ternarize(W.numpy(), np.eye(300), TernaryConfig()))
    source = W.to(compute.device)
    on_side = torch.zeros_like(source)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # A long product ahead of the weights: work on any other stream would see zeros.
        big = torch.randn(8192, 8192, device=compute.device)
        big @ big @ big
        on_side.copy_(source)
        gram = torch.eye(300, dtype=torch.float64, device=compute.device)
        result = ternarizer(backend, compute, TernaryConfig())(on_side, gram)
    np.testing.assert_array_equal(backend.to_host(result).trits, expected.trits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_gram_matrix_of_262144_correlated_rows_stays_positive_definite(compute, dtype):
    generator = torch.Generator().manual_seed(0)
    columns = 24
    mixing = torch.randn(8, columns, generator=generator)
    total = GramSum(columns, compute.device)
    exact = torch.zeros(columns, columns, dtype=torch.float64)
    for _ in range(128):
        # Eight directions carry all but a thousandth of the power, as in a language model.
        rows = torch.randn(2048, 8, generator=generator) @ mixing
        rows = (rows + 0.1 * torch.randn(2048, columns, generator=generator) + 1).to(dtype)
        exact += rows.double().T @ rows.double()
        total.add(rows.to(compute.device))
    C = total.finish().cpu()
    scale = torch.sqrt(torch.outer(exact.diagonal(), exact.diagonal()))
    # float32 sums of 8192 exact or once rounded products, then float64: some ε√8192 = 5e-6. Tensor cores add
    # 16-bit products without rounding, two bits beyond float32 at the least: each of 2048 may lose 2⁻²⁵ of
    # the sum so far, 3e-5 at the most, all in one direction.
    limit = 1e-5 if dtype.itemsize > 2 or compute.device.type == HOST.type else 4e-5
    assert ((C - exact).abs() / scale).max() < limit
    assert torch.equal(C, C.T)
    smallest = torch.linalg.eigvalsh(exact)[0].item()
    assert torch.linalg.eigvalsh(C)[0].item() == pytest.approx(smallest, rel=1e3 * limit)
    torch.linalg.cholesky(C)


def test_layers_are_ternarized_as_by_the_reference(compute):
    """Layers run in float32 on both, so that only the order of sums differs."""
    windows = torch.randint(3, tiny.VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))
    errors = {}
    for name, precision in (("reference", "float64"), ("gpu", "float64"), ("gpu", "float32")):
        backend = load_backend(name, precision)
        where = Compute(compute.device, torch.float32, compute.memory) if name == "gpu" else Compute()
        model = tiny.make_model("llama", torch.bfloat16, ternary=False)
        decoder = find_decoder_layers(model)
        passage = capture_inputs(model, decoder, windows, where)
        method = ternarizer(backend, where, TernaryConfig(block_size=tiny.BLOCK))
        layer = next(fit_layers(passage, method))
        errors[precision, name] = [m.result.report.relative_output_error for m in layer.matrices]
        for matrix in layer.matrices:
            packed = packed_tensors(matrix.name, matrix.result, backend)
            stored = unpack_base3(packed[f"{matrix.name}.trits"].numpy(), matrix.result.trits.shape[1])
            np.testing.assert_array_equal(stored, backend.to_host(matrix.result.trits))
            weight = model.get_submodule(matrix.name).weight
            dense = torch.from_numpy(backend.to_host(matrix.result).dequantize())
            assert torch.equal(weight, dense.bfloat16())
    expected = errors["float64", "reference"]
    # On a device the layers' own float32 products are summed in another order.
    rel = 2e-3 if compute.memory else OUTPUT_ERROR
    assert errors["float64", "gpu"] == pytest.approx(expected, rel=rel)
    assert errors["float32", "gpu"] == pytest.approx(expected, rel=rel)


def test_hidden_states_that_do_not_fit_wait_in_pinned_memory(compute):
    if compute.device.type != "cuda":
        pytest.skip("all memory is the host's")
    states = [torch.ones(1, 4, 8)]
    small = Compute(compute.device, None, memory=128)
    assert small.place(states, reserved=0)[0].is_cuda
    assert small.place(states, reserved=1)[0].is_pinned()


def test_a_shape_goes_through_the_whole_pipeline(compute):
    result = quantize_shape(Scale("tiny", 2, 3, 64), load_backend("gpu"), compute, say=lambda line: None)
    assert result["layers_measured"] == 2
    assert (result["peak_device_memory_gb"] > 0) == (compute.memory is not None)
    assert all(seconds > 0 for seconds in result["seconds_a_layer"].values())


def test_a_checkpoint_written_from_the_device_is_the_one_of_the_reference(compute, tmp_path):
    """The whole command, on a model that lies on a grid: both find it, whatever the layers run in."""
    folder = tiny.save(tiny.make_model("llama"), tmp_path / "llama")
    words = tmp_path / "words.txt"
    words.write_text(tiny.words(400))
    for backend in ("gpu", "reference"):
        options = Options(
            model=str(folder),
            out=tmp_path / backend,
            backend=backend,
            calibration=str(words),
            nsamples=8,
            seqlen=24,
            evaluation=str(words),
            evaluation_seqlen=24,
            config=TernaryConfig(block_size=tiny.BLOCK, reorder="none"),
        )
        report = quantize(options, say=lambda line: None)
        assert report["perplexity"]["after"]["value"] == pytest.approx(
            report["perplexity"]["before"]["value"], rel=1e-3
        )
    tensors = [dict(tensors_of(tmp_path / backend)) for backend in ("gpu", "reference")]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[1].items():
        assert torch.equal(tensors[0][name], tensor), name
