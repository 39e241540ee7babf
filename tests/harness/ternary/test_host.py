"""The packed product on a CPU: against exact products, and the same bits in any company."""

import copy
import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from harness.cpu import threads
from harness.models.experts import one_by_one
from harness.ternary.kernels import host
from harness.ternary.kernels.host import HostTensors, lay_out
from harness.ternary.kernels.launches import share_on_host, use_kernels
from harness.ternary.kernels.operation import ternary_linear
from harness.ternary.kernels.together import together
from harness.ternary.linear import TernaryLinear
from tests.gpu.packed_layers import TOLERANCE, layer_of, off

CPU = torch.device("cpu")


def exact(layer: TernaryLinear, x: torch.Tensor) -> torch.Tensor:
    return x.double() @ layer.matrix().dequantize(layer.block_size, torch.float64).T


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    block_size=st.sampled_from([1, 3, 5, 32, 63, 64, 65, 66, 128, 256, 1000]),
    tokens=st.integers(0, 40),
    grid=st.sampled_from(["float16", "int8"]),
    permuted=st.booleans(),
    symmetric=st.booleans(),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
)
def test_products_are_those_of_the_exact_weights(
    rows, columns, block_size, tokens, grid, permuted, symmetric, dtype
):
    permuted = permuted or grid == "int8"
    layer = layer_of(rows, columns, block_size, CPU, permuted, grid=grid, symmetric=symmetric)
    x = torch.randn(tokens, columns).to(dtype)
    expected = exact(layer, x)
    stored = {name: tensor.clone() for name, tensor in layer.stored().items()}
    grid_of_layer, order = layer.matrix().grid(), layer.matrix().permutation.long()
    share_on_host([layer])
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    # alpha * t and mu are summed apart, so rounding is relative to their magnitudes, also where they cancel.
    alpha, mu = (part.double().abs().repeat_interleave(block_size, 1)[:, :columns] for part in grid_of_layer)
    bound = TOLERANCE[dtype] * (x.double().abs()[:, order] @ (alpha + mu).T)
    assert ((y.double() - expected).abs() <= bound).all()
    assert layer.stored().keys() == stored.keys()
    assert all(torch.equal(layer.stored()[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("grid", ["float16", "int8"])
@pytest.mark.parametrize("shape", [(700, 576, 64), (256, 1100, 128), (130, 300, 32)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch_and_by_any_number_of_threads(shape, grid, monkeypatch):
    layer = layer_of(*shape, CPU, grid=grid)
    share_on_host([layer])
    x = torch.randn(300, shape[1])
    monkeypatch.setattr(host, "SHARED_WORK", 1)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(layer(x))
            results.append(torch.cat([layer(row[None]) for row in x]))
            results.append(torch.cat([layer(x[:5]), layer(x[5:])]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("grid", ["float16", "int8"])
def test_layers_of_one_input_share_a_product(grid, symmetric):
    layers = [
        layer_of(rows, 300, 64, CPU, permuted=grid == "int8", grid=grid, symmetric=symmetric)
        for rows in (5, 33, 40)
    ]
    if grid == "int8":
        for layer in layers:
            layer.permutation.copy_(layers[0].permutation)
    x = torch.randn(2, 7, 300)
    expected = [exact(layer, x) for layer in layers]
    share_on_host(layers)
    assert len({id(layer.packed) for layer in layers}) == 1
    for layer, y in zip(layers, expected, strict=True):
        assert off(layer(x), y) <= TOLERANCE[torch.float32]


def test_layers_of_other_orders_multiply_alone():
    layers = [layer_of(rows, 300, 64, CPU) for rows in (5, 33)]
    x = torch.randn(3, 300)
    expected = [exact(layer, x) for layer in layers]
    share_on_host(layers)
    assert layers[0].packed is not layers[1].packed
    for layer, y in zip(layers, expected, strict=True):
        assert off(layer(x), y) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("grid", ["float16", "int8"])
def test_the_plain_product_reads_the_same_layout(grid):
    layer = layer_of(33, 577, 64, CPU, grid=grid)
    x = torch.randn(4, 577, dtype=torch.float64)
    expected = exact(layer, x)
    share_on_host([layer])
    assert off(ternary_linear(x, *layer.packed.tensors()), expected) <= 1e-6
    # As on a device that the kernel does not run on.
    meta = [t.to("meta") if torch.is_tensor(t) else t for t in layer.packed.tensors()]
    assert ternary_linear(x.to("meta"), *meta).shape == (4, 33)


def test_numbers_that_are_not_finite_stay_in_their_row():
    layer = layer_of(24, 300, 64, CPU)
    share_on_host([layer])
    x = torch.randn(20, 300)
    clean = layer(x)
    for bad in (float("nan"), float("inf")):
        dirty = x.clone()
        dirty[1, 299] = bad
        y = layer(dirty)
        assert not y[1].isfinite().any()
        assert torch.equal(y[[0, *range(2, 20)]], clean[[0, *range(2, 20)]])


def test_small_and_large_halves_are_read_exactly():
    halves = torch.tensor([0.0, -0.0, 2.0**-24, -(2.0**-24), 6e-5, 65504.0, -65504.0, 0.1]).half()
    layer = TernaryLinear(1, 8, 64, "float16", permuted=False, bias=False, dtype=torch.float32)
    layer.trits.fill_(1 + 1 + 3 * (1 + 3 + 9 + 27))  # t = +1, filled up with 0
    layer.scale.copy_(halves[:, None])
    layer.shift.zero_()
    layer.keep_dense(False)
    share_on_host([layer])
    assert torch.equal(layer(torch.ones(1, 1))[0], halves.float())


def test_gradients_of_the_activations():
    layer = layer_of(24, 100, 64, CPU)
    x = torch.randn(3, 100, requires_grad=True)
    gradient = torch.randn(3, 24)
    expected = gradient.double() @ layer.matrix().dequantize(64, torch.float64)
    share_on_host([layer])
    layer(x).backward(gradient)
    assert off(x.grad, expected) <= 1e-6


def test_copies_and_other_dtypes():
    model = torch.nn.Sequential(layer_of(24, 100, 64, CPU), layer_of(7, 24, 64, CPU, bias=True))
    x = torch.randn(3, 100)
    expected = model(x)
    use_kernels(model)
    assert all(isinstance(layer.packed.tensors(), HostTensors) for layer in model)
    y = model(x)
    assert off(y, expected) <= 1e-5
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    assert twin[0].packed.words.data_ptr() != model[0].packed.words.data_ptr()
    half = twin.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half[0].packed.grid, model[0].packed.grid)


def test_what_is_loaded_into_the_tensors_is_seen_and_nothing_outlives_them():
    one, other = (layer_of(24, 100, 64, CPU, grid="int8") for _ in range(2))
    other.trits.copy_(other.trits.flip(0))
    x = torch.randn(2, 100)
    for layer in (one, other):
        share_on_host([layer])
    first, expected = one(x), other(x)
    assert not torch.equal(first, expected)
    for mine, theirs in zip(one.packed.tensors()[:5], other.packed.tensors()[:5], strict=True):
        mine.copy_(theirs)
    assert torch.equal(one(x), expected)
    one.packed.block_factors = torch.zeros_like(one.packed.block_factors)  # beside the same words
    assert not one(x).any()
    one.packed.block_factors = other.packed.block_factors
    assert torch.equal(one(x), expected)
    words = weakref.ref(one.packed.words)
    del one, mine, layer
    assert words() is None


def test_activations_of_another_width_are_refused():
    layer = layer_of(16, 300, 128, CPU)
    share_on_host([layer])
    for shape in ((2, 290), (4, 150)):
        with pytest.raises((RuntimeError, ValueError), match="300"):
            layer(torch.zeros(shape))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_layout_takes_little_more_than_the_checkpoint(symmetric):
    layer = TernaryLinear(4096, 64, 64, "int8", False, False, torch.float32, symmetric)
    layer.keep_dense(False)
    stored = sum(t.numel() * t.element_size() for t in layer.stored().values())
    layout = lay_out([layer.matrix()], 64)
    assert sum(t.numel() * t.element_size() for t in layout[:5] if t is not None) < 1.03 * stored


def test_a_model_compiles_without_a_break():
    layer = layer_of(24, 100, 64, CPU)
    share_on_host([layer])
    x = torch.randn(3, 100)
    compiled = torch.compile(lambda x: layer(x) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x) + 1)


@pytest.mark.parametrize("tokens", [0, 1, 5, 8, 9, 150])
def test_the_operation_returns_what_its_fake_implementation_promises(tokens):
    """Strides too: compiled code relies on them."""
    layer = layer_of(24, 100, 64, CPU)
    share_on_host([layer])
    x = torch.randn(tokens, 100)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.pt2_llm.ternary_linear.default, (x, *layer.packed.tensors()), test_utils=checks
    )
    for dtype in (torch.float32, torch.bfloat16):
        y = layer(x.to(dtype))
        assert y.is_contiguous()
        assert y.view(-1).shape == (24 * tokens,)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_pass_through_checkpoints(reentrant):
    layer = layer_of(24, 100, 64, CPU)
    x = torch.randn(3, 100, requires_grad=True)
    expected = torch.ones(3, 24).double() @ layer.matrix().dequantize(64, torch.float64)
    share_on_host([layer])
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert off(x.grad, expected) <= 1e-6


def test_an_output_without_gradients_is_not_kept_for_a_layer_that_needs_them():
    layers = [layer_of(rows, 100, 64, CPU, permuted=False) for rows in (5, 7)]
    share_on_host(layers)
    x = torch.randn(2, 100, requires_grad=True)
    with torch.no_grad():
        layers[0](x)
    assert layers[1](x).requires_grad


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.complex64])
def test_activations_that_are_no_real_numbers_are_refused(kernels, dtype):
    layer = layer_of(24, 100, 64, CPU)
    if kernels:
        share_on_host([layer])
    with pytest.raises(RuntimeError, match="must be of a real floating-point type"):
        layer(torch.ones(2, 100, dtype=dtype))


def test_ranges_of_rows_are_all_rows_once():
    seen: list[tuple[int, int]] = []
    lock = threading.Lock()

    def note(begin: int, end: int) -> None:
        with lock:
            seen.append((begin, end))

    for rows, count in ((10, 1), (10, 3), (7, 7), (1000, 4), (3, 3)):
        seen.clear()
        threads.share(note, rows, count)
        assert sorted(row for begin, end in seen for row in range(begin, end)) == list(range(rows))
        assert len(seen) == count


def test_a_failure_in_another_thread_is_raised():
    def fail(begin: int, end: int) -> None:
        if begin:
            raise FloatingPointError("row")

    with pytest.raises(FloatingPointError, match="row"):
        threads.share(fail, 10, 3)


def test_several_threads_may_run_one_model():
    layer = layer_of(700, 576, 64, CPU)
    share_on_host([layer])
    inputs = [torch.randn(9, 576) for _ in range(8)]
    expected = [layer(x) for x in inputs]
    results: list[torch.Tensor | None] = [None] * 8

    def work(index: int) -> None:
        for _ in range(20):
            results[index] = layer(inputs[index])

    workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("shared_work", [1, 20000, 2**21], ids=["apart", "some together", "all together"])
def test_products_of_several_matrices_have_the_bits_of_each(shared_work, monkeypatch):
    """With threads for each product, for some of them, and for all as wholes; one has no tokens."""
    layers = [layer_of(70, 130, 64, CPU, permuted=i == 2) for i in range(5)]
    for layer in layers:
        share_on_host([layer])
    layers[3].bias = torch.nn.Parameter(torch.randn(70), requires_grad=False)
    inputs = [torch.randn(tokens, 130).to(torch.bfloat16) for tokens in (1, 3, 0, 1, 200)]
    expected = one_by_one(layers, inputs)
    monkeypatch.setattr(host, "SHARED_WORK", shared_work)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with monkeypatch.context() as patch:
            patch.setattr(TernaryLinear, "forward", None)  # no layer is called by itself
            products = together(layers, inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(product, own) for product, own in zip(products, expected, strict=True))
    assert all(product.dtype == torch.bfloat16 for product in products)


def test_layers_that_are_watched_are_called():
    layers = [layer_of(20, 60, 64, CPU) for _ in range(2)]
    for layer in layers:
        share_on_host([layer])
    seen = []
    layers[1].register_forward_hook(lambda *arguments: seen.append(arguments[0]))
    together(layers, [torch.randn(1, 60)] * 2)
    assert seen == [layers[1]]
    x = torch.randn(2, 60, requires_grad=True)
    sum(product.sum() for product in together(layers, [x, x])).backward()
    assert x.grad.abs().min() > 0
    layers[0].keep_dense(True)
    assert together(layers, [x, x])[0].shape == (2, 20)
