"""Error feedback: the factor is right, outputs are better than by rounding, and what is stored is what was chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import (
    DAMPING,
    Codes,
    _factorize,
    _invert_upper,
    codes_of,
    encode_codes,
    feedback_codes,
    feedback_factor,
    output_error,
    step_shape,
)
from spectral_surgery.codec.quantizers.scalar import DeadZone
from spectral_surgery.errors import ConfigError, ShapeError
from tests.support.entropy import entropy


def skewed(features: int, samples: int = 400, seed: int = 0) -> Tensor:
    """Second moment of inputs that are correlated, as those of a trained model are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / torch.arange(1, features + 1).sqrt()
    x = torch.randn(samples, features, generator=generator) @ mix
    return x.T @ x


@pytest.mark.parametrize("axes", [(0, 1), (1,), (0,)])
def test_the_factor_is_the_inverse_in_the_domain_of_the_codes(axes: tuple[int, ...]) -> None:
    moment, basis = skewed(80), Basis("dct", 32, axes)
    factor = feedback_factor(moment, basis).double()
    turn = Basis("dct", 32, (1,)).forward(torch.eye(80)) if 1 in axes else torch.eye(80)  # x -> x Tᵀ
    turned = turn.double().T @ moment.double() @ turn.double() / moment.diagonal().mean()
    expected = turned + DAMPING * torch.eye(80)
    torch.testing.assert_close(torch.linalg.inv(factor.T @ factor), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("size", [1, 256, 257, 1030])
def test_a_triangle_is_inverted_in_place(size: int) -> None:
    root = torch.linalg.cholesky(skewed(size).double() + 0.1 * torch.eye(size, dtype=torch.float64)).T.contiguous()
    inverse = root.clone()
    _invert_upper(inverse)
    torch.testing.assert_close(inverse @ root, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.equal(inverse, inverse.triu())


@pytest.mark.parametrize("size", [1, 256, 700, 1100])
def test_a_matrix_is_factorized_in_place(size: int) -> None:
    matrix = skewed(size) / size + 0.1 * torch.eye(size)
    root = matrix.clone()
    _factorize(root)
    assert torch.equal(root, root.triu())
    error = root.double() @ root.double().T - matrix.double()
    assert float(error.norm() / matrix.double().norm()) < 2e-7


@pytest.mark.parametrize("shape", [(40, 200), (130, 70)])
def test_feedback_halves_the_error_of_the_outputs(shape: tuple[int, int]) -> None:
    weight, moment, basis = torch.randn(shape, generator=torch.Generator().manual_seed(1)), skewed(shape[1]), Basis()
    coefficients, step = basis.forward(weight), 0.7
    quantizer = DeadZone(0.5 * step, step)
    fed = feedback_codes(coefficients, feedback_factor(moment, basis), quantizer)
    plain = Codes((coefficients / step).round().to(torch.int32), step)
    errors = [output_error(weight, basis.inverse(codes.coefficients()), moment) for codes in (fed, plain)]
    assert errors[0] < 0.6 * errors[1]


def test_without_correlation_feedback_is_rounding() -> None:
    coefficients, step = torch.randn(30, 150, generator=torch.Generator().manual_seed(2)), 0.3
    factor = feedback_factor(torch.eye(150), Basis("identity"))
    codes = feedback_codes(coefficients, factor, DeadZone(0.5 * step, step))
    assert torch.equal(codes.values, (coefficients / step).round().to(torch.int32))


def test_codes_column_by_column_as_the_definition_says() -> None:
    coefficients, factor = (
        torch.randn(7, 300, generator=torch.Generator().manual_seed(3)),
        feedback_factor(skewed(300), Basis("identity")),
    )
    step = 0.5
    rest, expected = coefficients.clone(), torch.empty(7, 300, dtype=torch.int32)
    for j in range(300):
        level = ((rest[:, j].abs() - 0.6 * step) / step).floor().add(1).clamp(min=0)
        expected[:, j] = (torch.sign(rest[:, j]) * level).to(torch.int32)
        error = (rest[:, j] - torch.sign(rest[:, j]) * (level + 0.1 * (level > 0)) * step) / factor[j, j]
        rest[:, j:] -= error[:, None] * factor[j, j:]
    codes = feedback_codes(coefficients, factor, DeadZone(0.6 * step, step), offset=0.1)
    assert (codes.values == expected).float().mean() > 0.999  # sums in another order may tip a tie


@pytest.mark.parametrize("largest", [3, 1000])
def test_what_is_stored_is_what_was_chosen(largest: int) -> None:
    generator = torch.Generator().manual_seed(4)
    values = torch.randint(-largest, largest + 1, (100, 90), generator=generator, dtype=torch.int32)
    codes = Codes(values, 0.25, -0.125)
    coefficients = codes.coefficients() + 0.01
    encoded, report = encode_codes(coefficients, codes, Basis("dct", 32))
    again = encoded.decode()
    assert torch.equal(again.codes.to(torch.int32), values)
    torch.testing.assert_close(encoded.to_dense(), Basis("dct", 32).inverse(codes.coefficients()))
    assert report.error_energy == pytest.approx(100 * 90 * 1e-4, rel=1e-2)
    assert report.kept == int(torch.count_nonzero(values))
    assert torch.equal(codes.T.values, values.T)


def test_moments_that_say_nothing() -> None:
    with pytest.raises(ShapeError, match=r"moment: is \(3, 4\); expected a square matrix"):
        feedback_factor(torch.ones(3, 4), Basis())
    for bad in (torch.zeros(4, 4), torch.full((4, 4), torch.nan), torch.full((4, 4), torch.inf)):
        with pytest.raises(ConfigError, match="moment: inputs are zero or not finite"):
            feedback_factor(bad, Basis())


def test_features_that_are_never_used_do_no_harm() -> None:
    moment = skewed(64)
    moment[10], moment[:, 10] = 0, 0
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    codes = feedback_codes(Basis().forward(weight), feedback_factor(moment, Basis()), DeadZone(0.1, 0.2))
    assert output_error(weight, Basis().inverse(codes.coefficients()), moment) < 0.1
    assert output_error(torch.zeros(2, 64), torch.zeros(2, 64), moment) == 0


def test_steps_of_columns_leave_less_error_at_the_same_entropy() -> None:
    sizes, basis = torch.logspace(0, -1, 128), Basis("identity")  # features of very different size, as real ones are
    weight, moment = torch.randn(256, 128, generator=torch.Generator().manual_seed(1)), skewed(128)
    moment = sizes[:, None] * moment * sizes
    coefficients, factor = basis.forward(weight), feedback_factor(moment, basis)
    errors = {}
    for power in (0.0, 0.6):
        columns = step_shape(factor, power)
        assert float(columns.log().mean()) == pytest.approx(0, abs=1e-5)
        codes = feedback_codes(coefficients, factor, DeadZone(0.4, 0.8), 0.0, columns)
        bits = entropy(codes.values.reshape(-1).to(torch.int16).numpy())
        errors[power] = output_error(weight, basis.inverse(codes.coefficients()), moment) * 2**bits  # at zero bits
    assert errors[0.6] < 0.95 * errors[0.0]


def test_equal_columns_are_one_step() -> None:
    coefficients, step = torch.randn(30, 150, generator=torch.Generator().manual_seed(2)), 0.25
    factor = feedback_factor(skewed(150), Basis("identity"))
    assert torch.equal(step_shape(factor, 0.0), torch.ones(150))
    quantizer = DeadZone(0.55 * step, step)
    one, many = (feedback_codes(coefficients, factor, quantizer, 0.1, own) for own in (None, torch.ones(150)))
    assert torch.equal(one.values, many.values)
    assert torch.equal(one.coefficients(), many.coefficients())
    assert torch.equal(codes_of(many.values, many.steps, 0.1).steps, many.steps)
    with pytest.raises(ShapeError, match="transpose: every column has its own step"):
        _ = many.T


def test_stored_steps_of_columns_are_those_of_the_codes() -> None:
    weight, basis = torch.randn(130, 70, generator=torch.Generator().manual_seed(4)), Basis()
    coefficients, factor = basis.forward(weight), feedback_factor(skewed(70), basis)
    codes = feedback_codes(coefficients, factor, DeadZone(0.3, 0.5), 1.5, step_shape(factor, 1.0))
    assert torch.equal(codes.steps, codes.steps.bfloat16().float())
    encoded, report = encode_codes(coefficients, codes, basis)
    torch.testing.assert_close(encoded.to_dense(), basis.inverse(codes.coefficients()))
    plain = encode_codes(coefficients, Codes(codes.values, 0.5, 1.5), basis)[1]
    assert report.stored_bytes - plain.stored_bytes == 2 * 71 - 8
