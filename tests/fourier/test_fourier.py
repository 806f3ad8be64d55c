"""Every way to apply a FourierFT update equals the definition, in values and in gradients of all orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spectral_surgery import fourier as op
from spectral_surgery.fourier import (
    adapted_linear,
    beside_weight,
    delta_rows,
    delta_weight,
    dense,
    fold,
    fourier_delta,
    reference,
)
from spectral_surgery.fourier import dispatch as choice
from spectral_surgery.fourier.dispatch import Way
from spectral_surgery.fourier.operators import linear_backward_op, linear_op, weight_backward_op, weight_op
from spectral_surgery.fourier.rfft_positions import Delta

SHAPES = [(12, 20), (21, 7), (9, 9), (64, 48), (16, 15), (17, 16), (1, 5), (7, 1), (1, 1)]
LEADING = [(), (1,), (3,), (2, 3), (40,), (3, 0)]
SCALING = 7.0


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def places(rows: int, columns: int, count: int = 30) -> Tensor:
    return torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))[:count]


def error(expected: Tensor, actual: Tensor) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    norm = float(expected.detach().norm())
    difference = float((expected - actual).detach().norm())
    return difference / norm if norm else difference


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside_weight, "_BLOCK", 200)
    monkeypatch.setattr(dense, "_BLOCK", 1)


@pytest.fixture(params=list(Way), ids=lambda way: way.value)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    monkeypatch.setattr(op, "choose", lambda *_: request.param)
    found: Way = request.param
    return found


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_is_the_definition(shape: tuple[int, int], leading: tuple[int, ...]) -> None:
    positions = places(*shape)
    x, c = draw(*leading, shape[1]).requires_grad_(), draw(len(positions), seed=1).requires_grad_()
    expected = reference.fourier_delta(x, c, positions, shape[0], SCALING)
    got = fourier_delta(x, c, positions, shape[0], SCALING)
    dy = draw(*got.shape, seed=2)
    wanted, grads = (torch.autograd.grad(y, (x, c), dy) for y in (expected, got))
    assert max(error(one, other) for one, other in zip((expected, *wanted), (got, *grads), strict=True)) < 1e-12


@pytest.mark.usefixtures("small_blocks", "way")
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_the_definition_every_way(shape: tuple[int, int], leading: tuple[int, ...]) -> None:
    positions = places(*shape)
    tensors = (draw(*leading, shape[1]), draw(*shape, seed=3), draw(shape[0], seed=4), draw(len(positions), seed=5))
    x, weight, bias, c = (t.requires_grad_() for t in tensors)
    expected = linear(x, weight, bias) + reference.fourier_delta(x, c, positions, shape[0], SCALING)
    got = adapted_linear(x, weight, bias, c, fold(positions, *shape), SCALING)
    dy = draw(*got.shape, seed=6)
    wanted, grads = (torch.autograd.grad(y, (x, weight, bias, c), dy) for y in (expected, got))
    assert max(error(one, other) for one, other in zip((expected, *wanted), (got, *grads), strict=True)) < 1e-11


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("needs", range(1, 16))
def test_gradients_of_first_and_second_order(needs: int) -> None:
    tensors = (draw(2, 6), draw(5, 6, seed=1), draw(5, seed=2), draw(9, seed=3))
    inputs = [t.requires_grad_(bool(needs >> i & 1)) for i, t in enumerate(tensors)]
    folded = fold(places(5, 6, 9), 5, 6)

    def run(x: Tensor, weight: Tensor, bias: Tensor, c: Tensor) -> Tensor:
        return adapted_linear(x, weight, bias, c, folded, SCALING)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("shape", [(6, 8), (5, 8), (6, 7), (5, 7)], ids=str)
def test_every_place_alone_and_all_at_once(shape: tuple[int, int]) -> None:
    # first and middle frequencies, and pairs (r, q), (-r, -q) with one basis function
    rows, columns = shape
    x, dy = draw(3, columns), draw(3, rows, seed=1)
    for positions in (*torch.arange(rows * columns).split(1), torch.arange(rows * columns).flip(0)):
        c = draw(len(positions), seed=2).requires_grad_()
        expected, got = (f(x, c, positions, rows, SCALING) for f in (reference.fourier_delta, fourier_delta))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
        wanted, grad = (torch.autograd.grad(y, c, dy)[0] for y in (expected, got))
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-13)
        with torch.no_grad():
            row = adapted_linear(x[:1].float(), torch.zeros(shape), None, c.float(), fold(positions, *shape), SCALING)
        torch.testing.assert_close(row, expected[:1].float(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_weight_and_rows_are_the_definition(shape: tuple[int, int]) -> None:
    positions, base = places(*shape), draw(*shape, seed=1).requires_grad_()
    c = draw(len(positions)).requires_grad_()
    folded = fold(positions, *shape)
    expected = reference.delta_weight(c, positions, shape, SCALING)
    got = delta_weight(c, positions, shape, SCALING)
    assert error(expected, got) < 1e-12
    assert torch.equal(delta_weight(c, folded, shape, SCALING), got)
    assert error(base + expected, delta_weight(c, folded, shape, SCALING, base)) < 1e-12
    gradient = draw(*shape, seed=2)
    wanted, grad = (torch.autograd.grad(w, c, gradient)[0] for w in (expected, got))
    assert error(wanted, grad) < 1e-12
    ids = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 0]])
    for some in (ids, ids.repeat(shape[0], 1)):
        again = reference.delta_weight(c, positions, shape, SCALING)[some]
        picked = delta_rows(some, c, folded, shape, SCALING)
        assert error(again, picked) < 1e-12
        weights = draw(*picked.shape, seed=3)
        wanted, grad = (torch.autograd.grad(w, c, weights)[0] for w in (again, picked))
        assert error(wanted, grad) < 1e-12


@pytest.mark.parametrize("with_base", [True, False])
def test_second_order_of_the_weight(with_base: bool) -> None:
    folded, c, base = fold(places(5, 6, 9), 5, 6), draw(9).requires_grad_(), draw(5, 6).requires_grad_()

    def run(c: Tensor, base: Tensor) -> Tensor:
        return delta_weight(c, folded, (5, 6), SCALING, base if with_base else None).tanh() * base

    assert torch.autograd.gradcheck(run, (c, base))
    assert torch.autograd.gradgradcheck(run, (c, base))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float64, 1e-12)],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_precisions(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    shape, positions, scaling = (48, 60), places(48, 60), 300.0
    x, weight, bias = (draw(*s).to(dtype) for s in ((tokens, 60), (48, 60), (48,)))
    c = draw(30, seed=1).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    folded, delta = fold(positions, *shape), reference.delta_weight(c.double(), positions, shape, scaling)
    residual = fourier_delta(x, c, positions, 48, scaling)
    assert residual.dtype == dtype
    assert error(x.double() @ delta.T, residual.double()) < tolerance
    expected = linear(x.double(), weight.double() + delta, bias.double())
    dy = draw(tokens, 48, seed=2).to(dtype)
    wanted = torch.autograd.grad(expected, c, dy.double())[0]
    got = adapted_linear(x.requires_grad_(), weight, bias, c, folded, scaling)
    assert error(expected, got.double()) < tolerance
    dx, dc = torch.autograd.grad(got, (x, c), dy)
    assert (dx.dtype, dc.dtype) == (dtype, c.dtype)
    assert error(dy.double() @ (weight.double() + delta).detach(), dx.double()) < tolerance
    assert error(wanted, dc) < 1e-6
    with torch.inference_mode():
        alone = adapted_linear(x, weight, bias, c, folded, scaling)
    assert alone.dtype == dtype
    assert error(expected, alone.double()) < tolerance


@pytest.mark.usefixtures("way")
def test_memory_layout_does_not_matter() -> None:
    positions = places(12, 20)
    x, c = draw(20, 4, 3).permute(2, 1, 0), draw(60, seed=1)[::2]
    weight, folded = draw(20, 12, seed=2).T, fold(positions, 12, 20)
    expected = linear(x, weight) + reference.fourier_delta(x, c, positions, 12, SCALING)
    assert error(expected, adapted_linear(x, weight, None, c, folded, SCALING)) < 1e-12
    row = x.float()[:1, :1]
    with torch.no_grad():
        assert error(expected[:1, :1].float(), adapted_linear(row, weight.float(), None, c, folded, SCALING)) < 1e-6


@pytest.mark.usefixtures("way")
def test_functional_transforms() -> None:
    folded, positions = fold(places(5, 6, 9), 5, 6), places(5, 6, 9)
    x, weight, c = draw(4, 3, 6), draw(5, 6), draw(9)

    def ours(c: Tensor, x: Tensor) -> Tensor:
        return adapted_linear(x, weight, None, c, folded, SCALING).square().sum()

    def plain(c: Tensor, x: Tensor) -> Tensor:
        return (linear(x, weight) + reference.fourier_delta(x, c, positions, 5, SCALING)).square().sum()

    def every(f: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
        yield torch.func.vmap(f, (None, 0))(c, x)
        yield torch.func.vmap(f, (0, None))(torch.stack((c, 2 * c)), x)
        yield torch.func.vmap(f, (0, 1))(torch.stack((c, 2 * c, -c)), x)
        yield torch.func.grad(f)(c, x)
        yield torch.func.vmap(torch.func.grad(f), (None, 0))(c, x)
        yield torch.func.vmap(torch.func.grad(f, argnums=1), (None, 0))(c, x)
        yield torch.func.jacrev(torch.func.grad(f))(c, x)

    for expected, got in zip(every(plain), every(ours), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own
def test_forward_mode_is_refused_by_torch() -> None:
    folded = fold(places(5, 6, 9), 5, 6)
    with pytest.raises(RuntimeError, match=r"(?i)forward.*AD|jvp"):
        torch.func.jvp(lambda c: fourier_delta(draw(2, 6), c, folded, 5, SCALING), (draw(9),), (draw(9),))


def test_operators_are_registered_completely() -> None:
    folded = fold(places(5, 6, 9), 5, 6)
    x, dy, weight, bias, c = (draw(*s) for s in ((2, 6), (2, 5), (5, 6), (5,), (9,)))
    delta = (c, *folded, 5, 6, SCALING)
    checked: list[tuple[Any, tuple[Any, ...]]] = [
        (linear_op, (x, weight, bias, False, *delta)),
        (linear_op, (x, None, None, False, *delta)),
        (linear_op, (x, weight, None, True, *delta)),
        (linear_backward_op, (dy, x, weight, True, False, *delta)),
        (linear_backward_op, (dy, None, None, True, False, *delta)),
        (weight_op, (weight, *delta)),
        (weight_op, (None, *delta)),
        (weight_backward_op, (weight, *delta)),
    ]
    for operation, arguments in checked:
        assert set(torch.library.opcheck(operation, arguments).values()) == {"SUCCESS"}


@pytest.mark.usefixtures("way")
def test_compiled_in_one_graph() -> None:
    torch.compiler.reset()
    folded, weight, bias = fold(places(12, 20), 12, 20), draw(12, 20).float(), draw(12).float()

    def step(x: Tensor, c: Tensor) -> Tensor:
        return adapted_linear(x, weight, bias, c, folded, SCALING).relu()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 3, 8):
        x, c = draw(tokens, 20).float().requires_grad_(), draw(30).float().requires_grad_()
        expected, got = step(x, c), compiled(x, c)
        torch.testing.assert_close(got, expected)
        wanted, grads = (torch.autograd.grad(y.sum(), (x, c)) for y in (expected, got))
        torch.testing.assert_close(grads, wanted)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, c), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("way")
def test_checkpointed_and_under_autocast() -> None:
    folded, weight = fold(places(12, 20), 12, 20), draw(12, 20).float()
    x, c = draw(3, 20).float().requires_grad_(), draw(30).float().requires_grad_()

    def step(x: Tensor, c: Tensor) -> Tensor:
        return adapted_linear(x, weight, None, c, folded, SCALING).relu()

    expected = torch.autograd.grad(step(x, c).sum(), (x, c))
    got = torch.autograd.grad(checkpoint(step, x, c, use_reentrant=False).sum(), (x, c))
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))
    with torch.autocast("cpu", torch.bfloat16):  # FFTs stay in float32
        residual = fourier_delta(x.bfloat16(), c.bfloat16(), folded, 12, SCALING)
    assert residual.dtype == torch.float32
    assert torch.equal(residual, fourier_delta(x.bfloat16().float(), c.bfloat16().float(), folded, 12, SCALING))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [t.untyped_storage().nbytes() // 4 for t in made if isinstance(t, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


def test_nothing_of_the_size_of_the_weight_is_made() -> None:
    side, tokens = 512, 8
    folded, weight = fold(places(side, side, 100), side, side), draw(side, side).float()
    delta = Delta(draw(100).float(), folded, (side, side), SCALING)
    x, dy = draw(tokens, side).float(), draw(tokens, side, seed=1).float()
    assert choice.choose(x, weight, delta.coefficients) is Way.BESIDE
    with Largest() as largest:
        beside_weight.add_forward(torch.zeros_like(dy), x, delta)
        beside_weight.add_backward(torch.zeros_like(x), x, dy, delta)
    assert 0 < largest.numel < side * side // 16


def test_the_choice_follows_the_counts() -> None:
    def chosen(tokens: int, side: int, count: int, dtype: torch.dtype = torch.float32, *, trains: bool = True) -> Way:
        tensors = (torch.empty(*s, device="meta", dtype=dtype) for s in ((tokens, side), (side, side), (count,)))
        x, weight, c = (t.requires_grad_(trains) for t in tensors)
        return choice.choose(x, weight, c)

    assert chosen(64, 4096, 1000) is Way.BESIDE
    assert chosen(1024, 4096, 1000) is Way.BESIDE
    assert chosen(1024, 1024, 1000) is Way.INSIDE
    assert chosen(16384, 1024, 20000) is Way.DENSE
    assert chosen(16384, 4096, 1000, trains=False) is Way.INSIDE
    assert chosen(16384, 1024, 1000, torch.bfloat16) is Way.BESIDE  # W + ΔW would be rounded
    assert chosen(256, 1024, 50000) is Way.BESIDE  # W + ΔW would be larger than the activations
    x = torch.empty(16384, 1024, device="meta").requires_grad_()
    assert choice.choose(x, torch.empty(1024, 1024, device="meta"), torch.empty(1000, device="meta")) is Way.INSIDE
