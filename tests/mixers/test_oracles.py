"""Each mixer against its definition, written out without any fast algorithm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.errors import CausalityError, ShapeError
from spectral_surgery.mixers import (
    MIXERS,
    HybridSpectralAttention,
    ProjectedMixer,
    SpectralMLPBlock,
    WindowAttention,
    leak,
)
from spectral_surgery.mixers.components import interpolate
from tests.mixers.cases import WIDTH, random_mixer, tokens


def close(got: Tensor, wanted: Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=0, atol=atol)


def fourier(size: int) -> Tensor:
    places = torch.arange(size, dtype=torch.float64)
    return torch.exp(-2j * math.pi * torch.outer(places, places) / size) / math.sqrt(size)


@pytest.mark.parametrize(("length", "width"), [(1, 1), (7, 5), (8, 6), (9, 16)])
def test_fnet(length: int, width: int) -> None:
    x = tokens(2, length, width)
    wanted = fourier(length) @ x.to(torch.complex128) @ fourier(width)
    close(MIXERS["fnet"].fresh(width)(x), wanted.real)


@pytest.mark.parametrize(("length", "kernel_length"), [(9, 40), (40, 40), (100, 40), (100, 2)])
def test_causal_fnet(length: int, kernel_length: int) -> None:
    x = tokens(2, length, 6)
    places = torch.arange(length, dtype=torch.float64)
    matrix = torch.exp(-2j * math.pi * torch.outer(places, places) / kernel_length) / math.sqrt(kernel_length)
    lags = places[:, None] - places
    matrix = matrix * ((lags >= 0) & (lags < kernel_length))
    wanted = matrix @ x.to(torch.complex128) @ fourier(6)
    close(MIXERS["causal_fnet"].fresh(6, {"kernel_length": kernel_length})(x), wanted.real)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 64])
def test_fftnet(length: int) -> None:
    mixer, x = random_mixer("fftnet"), tokens(2, length, WIDTH)
    gains = mixer.filter.gain(x.mean(1), length).repeat_interleave(4, -1)  # [B, F, D]
    bias = interpolate(mixer.activation.bias, length, 1).T.repeat_interleave(4, -1)
    z = (fourier(length)[: length // 2 + 1] @ x.to(torch.complex128)) * gains
    z = torch.relu(z.abs() + bias) * z / z.abs()
    z[:, 0] = z[:, 0].real.to(z.dtype)
    mirrored = z[:, 1 : (length + 1) // 2].flip(1).conj()
    close(mixer(x), (fourier(length).conj() @ torch.cat((z, mirrored), 1)).real)


@pytest.mark.parametrize("settings", [{"chunk": 16, "kernel_length": 40}, {"chunk": 7, "kernel_length": 9}])
def test_causal_fftnet(settings: dict[str, int]) -> None:
    mixer, x = random_mixer("causal_fftnet", settings=settings), tokens(2, 50, WIDTH)
    y = torch.zeros_like(x)
    for t in range(50):
        start = t // settings["chunk"] * settings["chunk"]
        context = x[:, :start].mean(1) if start else torch.zeros(2, WIDTH)
        gain = mixer.filter.gain(context, settings["kernel_length"])
        bias = interpolate(mixer.activation.bias, settings["kernel_length"], 1).T
        gain = gain * torch.relu(1 + bias / gain.abs().clamp_min(1e-3))
        kernel = torch.fft.irfft(gain, n=settings["kernel_length"], dim=1).repeat_interleave(4, -1)  # [B, L, D]
        for s in range(min(t + 1, settings["kernel_length"])):
            y[:, t] += kernel[:, s] * x[:, t - s]
    close(mixer(x), y, 1e-5)
    assert (mixer(x)[:, -1] - mixer(x[:, 20:])[:, -1]).abs().max() > 1e-3  # the gate does depend on the past


@pytest.mark.parametrize("name", ["fftnet", "causal_fftnet"])
def test_fftnet_can_start_as_the_identity(name: str) -> None:
    x = tokens(2, 300, WIDTH)
    close(MIXERS[name].fresh(WIDTH, {"init_std": 0.0, "modrelu_bias": 0.0})(x), x)


@pytest.mark.parametrize("name", ["spectral_mixing", "causal_spectral_mixing"])
@pytest.mark.parametrize("length", [1, 2, 63, 512, 1001])
def test_spectral_mixing_starts_as_the_identity(name: str, length: int) -> None:
    x = tokens(2, length, WIDTH)
    close(MIXERS[name].fresh(WIDTH)(x), x, 1e-6)


@pytest.mark.parametrize("length", [1, 6, 9, 16, 100])
def test_spectral_mixing(length: int) -> None:
    mixer, x = random_mixer("spectral_mixing"), tokens(2, length, WIDTH)
    half = torch.view_as_complex(interpolate(mixer.filter, length, 1)).T.to(torch.complex128)
    half[0] = half[0].real.to(half.dtype)
    if length % 2 == 0:
        half[-1] = half[-1].real.to(half.dtype)
    gains = torch.cat((half, half[1 : (length + 1) // 2].flip(0).conj()))
    y = fourier(length).conj() @ (gains * (fourier(length) @ x.to(torch.complex128)))
    close(mixer(x), y.real)


def test_a_filter_keeps_its_meaning_when_the_length_changes() -> None:
    mixer = random_mixer("spectral_mixing")
    inside = torch.zeros(1, 400, WIDTH)
    inside[:, 200] = 1
    short, long = mixer(inside[:, 150:250]), mixer(inside)
    near = (short - long[:, 150:250]).abs().amax((0, 2))
    assert near[10:90].max() < 0.02 * long.abs().max()
    assert long[:, 190:210].std() > 0.05


def test_causal_spectral_mixing() -> None:
    mixer, x = random_mixer("causal_spectral_mixing"), tokens(2, 70, WIDTH)
    kernel, y = mixer.kernel(), torch.zeros_like(x)
    for t in range(70):
        for s in range(min(t + 1, 40)):
            y[:, t] += kernel[:, s] * x[:, t - s]
    close(mixer(x), y)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [2, 3, 8, 100])
@pytest.mark.parametrize("length", [1, 5, 16, 50])
def test_attention_sees_its_window_and_no_more(length: int, window: int, is_causal: bool) -> None:
    attention = WindowAttention(WIDTH, 2, window, is_causal)
    x = tokens(3, length, WIDTH)
    query, key, value = (part.reshape(3, length, 2, 8).transpose(1, 2) for part in attention.inputs(x).chunk(3, -1))
    lags = torch.arange(length)[:, None] - torch.arange(length)
    seen = (lags >= 0) & (lags < window) if is_causal else lags.abs() <= window // 2
    y = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    close(attention(x), attention.output(y.transpose(1, 2).flatten(2)))


def test_window_attention_decodes_only_when_causal() -> None:
    with pytest.raises(CausalityError, match="window attention: expected a causal mixer"):
        WindowAttention(8, 2, 4, is_causal=False).new_cache(1, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["hybrid", "causal_hybrid"])
def test_hybrid(name: str) -> None:
    mixer, x = random_mixer(name), tokens(2, 50, WIDTH)
    close(mixer(x), mixer.attention(mixer.norm(x + mixer.spectral(x))))


def test_parts_of_a_hybrid_look_the_same_way() -> None:
    with pytest.raises(
        CausalityError, match=r"hybrid: expected both parts causal or.*got spectral part causal: True, attention"
    ):
        HybridSpectralAttention(random_mixer("causal_spectral_mixing"), WindowAttention(WIDTH, 2, 4, is_causal=False))


def test_spectral_mlp_block_wraps_any_mixer() -> None:
    x = tokens(2, 20, WIDTH)
    block = SpectralMLPBlock(random_mixer("causal_fftnet"), mlp_ratio=2, dropout=0.5)
    assert not torch.equal(block(x), block(x))
    block.eval()
    inner = x + block.mixer(block.mixer_norm(x))
    close(block(x), inner + block.mlp(block.mlp_norm(inner)))
    assert block.is_causal
    assert leak(block, WIDTH).before == 0


def test_projected_mixer() -> None:
    value, output = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 6)
    identity = MIXERS["causal_fftnet"].fresh(WIDTH, {"init_std": 0.0, "modrelu_bias": 0.0})
    projected, x = ProjectedMixer(value, identity, output), tokens(2, 20, 6)
    close(projected(x), output(value(x)))
    mask = torch.ones(2, 20)
    mask[:, :3] = 0
    assert not projected(x, mask)[:, :3].any()
    cache = projected.new_cache(2, torch.device("cpu"), torch.float32)
    close(torch.cat((projected(x[:, :15], None, cache), projected(x[:, 15:], None, cache)), 1), projected(x))
    with pytest.raises(ShapeError, match=r"projected mixer: expected one width of value, mixer and.*got 6, 16, 16"):
        ProjectedMixer(output, identity, output)
