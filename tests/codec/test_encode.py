"""A matrix there and back: rates and errors as asked, measured as reported, on every shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.parallel import one_torch_thread, parallel_map
from spectral_surgery.codec.pick_transform import choose_basis
from spectral_surgery.codec.quantized import QuantizedSpectrum, dequantize, grid
from spectral_surgery.codec.quantizers.scalar import DeadZone
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.memory import peak_rss_growth


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, decoded: Tensor) -> float:
    return float((weight.double() - decoded.double()).norm() / weight.double().norm())


@pytest.mark.parametrize(
    ("bits", "limit"), [(6.0, 0.02), (4.0, 0.08), (3.0, 0.16), (2.4, 0.238), (2.0, 0.315), (1.0, 0.63)]
)
def test_bits(bits: float, limit: float) -> None:
    weight = gaussian(640, 512)
    encoded, report = encode(weight, Target("bits", bits))
    assert report.bits_per_weight == pytest.approx(bits, rel=0.006)
    assert report.relative_error <= limit
    assert error(weight, encoded.to_dense()) == pytest.approx(report.relative_error, rel=1e-3)
    frames = sum(map(len, encoded.frames))
    assert report.stored_bytes == frames + 8 * (len(encoded.frames) + 1) + 4 * 2


def test_density() -> None:
    weight = gaussian(640, 512)
    encoded, report = encode(weight, Target("density", 0.2))
    assert report.density == pytest.approx(0.2, abs=1e-5)
    assert int((encoded.decode().codes != 0).sum()) == report.kept
    assert report.bits_per_weight <= 1.45
    assert report.relative_error == pytest.approx(0.595, abs=0.005)


@pytest.mark.parametrize("density", [0.05, 0.5, 0.8, 0.9, 0.99, 1.0])
def test_rounding_adds_little_to_what_is_dropped(density: float) -> None:
    weight = gaussian(512, 512)
    report = encode(weight, Target("density", density), Basis("identity"))[1]
    energy = weight.double().abs().reshape(-1).sort(descending=True).values.square()
    dropped = float((energy[round(density * energy.numel()) :].sum() / energy.sum()).sqrt())
    assert report.density == pytest.approx(density, abs=1e-4)
    assert report.relative_error <= max(1.01 * dropped, 0.0102)


@pytest.mark.parametrize("limit", [0.5, 0.1, 0.01, 0.001, 0.0001])
def test_an_error_limit_is_never_exceeded(limit: float) -> None:
    weight = gaussian(300, 200)
    encoded, report = encode(weight, Target("max_error", limit))
    assert 0.9 * limit < report.relative_error <= limit
    assert error(weight, encoded.to_dense()) <= limit


@pytest.mark.parametrize("threads", [1, 2])
def test_decoding_in_inference_mode(threads: int) -> None:
    weight = gaussian(1100, 2000)
    encoded, report = encode(weight, Target("bits", 3.0))
    assert len(encoded.frames) == 2
    with torch.inference_mode():
        dense = encoded.to_dense(threads=threads)
    dense.add_(0)  # a tensor like any other
    assert error(weight, dense) == pytest.approx(report.relative_error, rel=1e-3)


def test_the_bytes_do_not_depend_on_threads() -> None:
    weight = gaussian(4500, 700)
    before = torch.get_num_threads()
    for torch_threads in (1, 2):
        torch.set_num_threads(torch_threads)
        try:
            results = [encode(weight, Target("bits", 3.0), threads=threads)[0] for threads in (1, 2)]
        finally:
            torch.set_num_threads(before)
        assert results[0].frames == results[1].frames
        assert torch.equal(results[0].to_dense(threads=1), results[0].to_dense(threads=2))
    assert len(results[0].frames) > 2


def test_a_zero_matrix_costs_nothing() -> None:
    encoded, report = encode(torch.zeros(500, 600), Target("bits", 4.0))
    assert report.relative_error == 0
    assert report.bits_per_weight < 0.02
    assert not encoded.to_dense().any()


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e8, 1e15])
def test_scale_does_not_matter(scale: float) -> None:
    weight = gaussian(200, 100)
    report = encode(weight * scale, Target("bits", 4.0))[1]
    assert report.relative_error == pytest.approx(encode(weight, Target("bits", 4.0))[1].relative_error, rel=0.02)


def test_a_huge_outlier_and_a_constant() -> None:
    weight = gaussian(256, 256)
    weight[7, 9] = 200.0
    encoded, report = encode(weight, Target("max_error", 0.01))
    assert report.relative_error <= 0.01
    assert float(encoded.to_dense()[7, 9]) == pytest.approx(200, rel=0.01)
    report = encode(torch.full((256, 256), 0.3), Target("bits", 4.0))[1]
    assert report.relative_error < 0.01


@pytest.mark.parametrize(
    ("weight", "kind", "text"),
    [
        (torch.zeros(3), ShapeError, r"weight is \(3,\)"),
        (torch.zeros(0, 3), ShapeError, "non-empty"),
        (torch.zeros(3, 3, dtype=torch.int8), ConfigError, "weight is torch.int8"),
        (torch.full((3, 3), float("nan")), ConfigError, "NaN or infinite"),
        (torch.full((3, 3), float("inf")), ConfigError, "NaN or infinite"),
        (torch.full((3, 3), 1e300, dtype=torch.float64), ConfigError, "overflows float32"),
        (torch.cat([torch.zeros(600, 500), torch.full((1, 500), float("nan"))]), ConfigError, "NaN or infinite"),
        (torch.full((3, 3), 1e26), ConfigError, r"exceeds 1e\+25"),
        (torch.full((3, 3), 1e-35), ConfigError, "all magnitudes are below 1e-30"),
    ],
)
def test_weights_that_cannot_be_encoded(weight: Tensor, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        encode(weight, Target("bits", 4.0))


def test_rows_decode_alone() -> None:
    spectrum = encode(gaussian(300, 90), Target("bits", 4.0))[0].decode()
    dense = spectrum.to_dense()
    for start, stop in ((0, 1), (63, 65), (100, 100), (5, 299), (256, 300)):
        torch.testing.assert_close(spectrum.rows(start, stop), dense[start:stop], rtol=1e-4, atol=1e-7)
    with pytest.raises(ShapeError, match="rows: 5:301 of 300 rows"):
        spectrum.rows(5, 301)


def test_dequantize_is_the_formula_also_with_a_step_per_column() -> None:
    codes = torch.tensor([[0, 1, -2], [3, -1, 0]], dtype=torch.int8)
    step = torch.tensor([1.0, 10.0, 100.0])
    expected = [[0, 12.5, -225.0], [3.25, -12.5, 0]]
    assert dequantize(codes, step, 0.25).tolist() == expected
    spectrum = QuantizedSpectrum(codes, step, 0.25, "identity", 64, (0, 1))
    assert spectrum.to_dense().tolist() == expected


@pytest.mark.parametrize("quantizer", [DeadZone(0.3, 0.5), DeadZone(0.6, 1.0), DeadZone(1.28, 0.5), DeadZone(1.2, 2.0)])
def test_reconstruction_points_are_at_centroids_on_an_int8_grid(quantizer: DeadZone) -> None:
    x = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    codes, moments = quantizer.quantize(x)
    largest = int(codes.abs().max())
    step, offset = quantizer.reconstruction(moments, largest)
    got = float((x - dequantize(codes, torch.tensor([step]), offset)).square().sum())
    centroids = edges = 0.0
    for level in range(largest + 1):
        inside = x[codes.abs() == level].abs()
        if inside.numel():
            centroids += float((inside - (inside.mean() if level else 0)).square().sum())
            edges += float(
                (inside - (quantizer.dead_zone + (level - 1) * quantizer.step if level else 0)).square().sum()
            )
    assert centroids <= got <= 1.01 * centroids
    assert got < edges
    fine = grid(largest, offset)
    assert fine > 0
    assert offset * fine == pytest.approx(round(offset * fine))
    assert (largest + offset) * fine <= 127


def test_choose_basis() -> None:
    phase = torch.linspace(0, 3, 256)
    smooth = torch.outer(torch.cos(2 * phase), torch.sin(phase)) + 0.05 * gaussian(256, 256)
    spiky = torch.zeros(256, 256)
    spiky.view(-1)[:: 257 * 3] = 1.0
    candidates = [Basis(name, 64) for name in ("dct", "identity", "hadamard")]
    for target in (Target("bits", 2.0), Target("density", 0.1), Target("max_error", 0.2)):
        assert choose_basis(smooth, target, candidates).transform == "dct"
        assert choose_basis(spiky, target, candidates).transform == "identity"
        assert choose_basis(gaussian(256, 256), target, candidates).transform == "dct"


def test_parallel_map_keeps_order_and_thread_count() -> None:
    before = torch.get_num_threads()
    assert parallel_map(lambda i: i * i, list(range(20)), 3) == [i * i for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        parallel_map(lambda i: 1 // i, [1, 0], 2)
    with one_torch_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_memory_is_that_of_coefficients_codes_and_frames() -> None:
    weight = torch.randn(3072, 4096, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    encode(weight[:64], Target("bits", 3.0))
    _, grown = peak_rss_growth(lambda: encode(weight, Target("bits", 3.0), threads=2))
    if grown is None:
        pytest.skip("the system does not tell")
    assert 4 * weight.numel() < grown < 8 * weight.numel()  # 8.5 to 10.3 where coefficients stay until the end


def test_a_smooth_matrix_gains_from_dct() -> None:
    phase = torch.linspace(0, 3, 256)
    smooth = torch.outer(torch.cos(2 * phase), torch.sin(phase)) + 0.05 * gaussian(256, 256)
    errors = {name: encode(smooth, Target("bits", 1.0), Basis(name))[1].relative_error for name in ("dct", "identity")}
    assert errors["dct"] < 0.1 * errors["identity"]


def test_choose_basis_leaves_bad_values_to_encode() -> None:
    weight = torch.full((70, 70), float("nan"))
    candidates = [Basis("dct"), Basis("identity")]
    assert choose_basis(weight, Target("bits", 2.0), candidates) == candidates[0]
    assert choose_basis(torch.zeros(70, 70), Target("density", 0.2), candidates) == candidates[0]
    assert choose_basis(weight, Target("bits", 2.0), candidates[1:]) == candidates[1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (130, 67), (65, 64), (257, 1023)])
@pytest.mark.parametrize("target", [Target("bits", 4.0), Target("density", 0.2), Target("max_error", 0.1)], ids=str)
def test_odd_shapes(shape: tuple[int, int], target: Target) -> None:
    weight = gaussian(*shape)
    encoded, report = encode(weight, target)
    assert encoded.to_dense().shape == encoded.shape == shape
    assert report.relative_error == pytest.approx(error(weight, encoded.to_dense()), rel=1e-3, abs=1e-6)
    assert report.stored_bytes == sum(map(len, encoded.frames)) + 8 * (len(encoded.frames) + 1) + 8
    with one_torch_thread():  # frames are decoded on one, and products of several threads may round otherwise
        assert torch.equal(encoded.decode().to_dense(), encoded.to_dense())
    if target.kind == "density":
        assert report.kept == max(1, round(0.2 * weight.numel()))
    if target.kind == "max_error":
        assert report.relative_error <= 0.1


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_type(dtype: torch.dtype) -> None:
    weight = (50 * gaussian(100, 90)).to(dtype)
    encoded, report = encode(weight, Target("max_error", 0.05))
    assert encoded.to_dense().dtype == torch.float32
    assert error(weight.to(torch.float32), encoded.to_dense()) == pytest.approx(report.relative_error, rel=1e-3)
    assert encoded.frames == encode(weight.to(torch.float32), Target("max_error", 0.05))[0].frames


def test_a_parameter_is_a_weight() -> None:
    weight = gaussian(100, 90)
    parameter = torch.nn.Parameter(weight)
    assert encode(parameter, Target("bits", 4.0))[0].frames == encode(weight, Target("bits", 4.0))[0].frames
    assert choose_basis(parameter, Target("bits", 4.0), [Basis(), Basis("identity")]) == Basis()


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_zeros_are_not_kept(density: float) -> None:
    weight = gaussian(300, 300)
    weight.view(-1)[torch.arange(90_000) % 10 > 0] = 0
    encoded, report = encode(weight, Target("density", density), Basis("identity"))
    assert report.density == pytest.approx(0.1, abs=0.002)
    assert not encoded.to_dense()[weight == 0].any()
    assert report.relative_error < 0.02


@pytest.mark.parametrize("limit", [0.1, 0.01, 0.001])
def test_few_distinct_values_keep_the_error_limit(limit: float) -> None:
    values = torch.tensor([1.0, 10.3, 17.1, -4.4])
    weight = values[torch.randint(0, 4, (300, 300), generator=torch.Generator().manual_seed(0))]
    assert encode(weight, Target("max_error", limit), Basis("identity"))[1].relative_error <= limit


@pytest.mark.parametrize("outlier", [1e4, 1e8, 1e20])
@pytest.mark.parametrize("name", ["dct", "identity"])
def test_outliers_cost_little(outlier: float, name: str) -> None:
    weight = 50 * gaussian(512, 512)
    weight[7, 9] = outlier
    encoded, report = encode(weight, Target("bits", 4.0), Basis(name))
    assert report.bits_per_weight <= 4.02
    assert report.relative_error <= 0.005
    assert float(encoded.to_dense()[7, 9]) == pytest.approx(outlier, rel=0.01)
    assert encode(weight, Target("max_error", 0.01), Basis(name))[1].relative_error <= 0.01


@pytest.mark.parametrize("name", ["dct", "identity"])
@pytest.mark.parametrize("target", [Target("bits", 4.0), Target("density", 0.2), Target("max_error", 0.1)], ids=str)
def test_constants_are_nearly_free(name: str, target: Target) -> None:
    report = encode(torch.full((512, 512), 0.37), target, Basis(name))[1]
    assert report.relative_error <= 0.01
    assert report.bits_per_weight <= 0.02


def test_reports_add_up() -> None:
    weights = gaussian(100, 90), 3 * gaussian(64, 90, seed=1)
    first, second = (encode(weight, Target("bits", 3.0)) for weight in weights)
    both = first[1] + second[1]
    decoded = torch.cat([first[0].to_dense(), second[0].to_dense()])
    assert both.weights == 164 * 90
    assert both.kept == first[1].kept + second[1].kept
    assert both.bits_per_weight == 8 * (first[1].stored_bytes + second[1].stored_bytes) / both.weights
    assert both.relative_error == pytest.approx(error(torch.cat(weights), decoded), rel=1e-3)


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0, 4.0, 8.0])
def test_frames_of_different_scale_have_tables_of_their_own(bits: float) -> None:
    """One table for all would miss the rate: symbols are as rare as they are in each frame."""
    scales = torch.tensor([0.01, 1.0, 0.1, 5.0, 0.02, 1.0]).repeat_interleave(2048)
    weight = gaussian(12288, 512) * scales[:, None]
    encoded, report = encode(weight, Target("bits", bits))
    assert report.bits_per_weight == pytest.approx(bits, rel=0.005)
    assert len({bytes(frame[:3]) for frame in encoded.frames}) > 1
    # the least error at this rate: every row gets the same noise, or none of the bits (reverse water-filling)
    noise = torch.logspace(-12, 2, 4000, dtype=torch.float64)[:, None]
    power = scales.double().square()
    rates = (power / noise).log2().div(2).clamp(min=0).mean(1)
    best = float(torch.minimum(power, noise[int((rates > bits).sum())]).sum() / power.sum()) ** 0.5
    assert best < report.relative_error < 1.45 * best
