"""Laws of every row of MIXERS."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from spectral_surgery.errors import CausalityError, ConfigError, ShapeError
from spectral_surgery.mixers import MIXERS, Mixer, leak, require_causal
from tests.mixers.cases import BIDIRECTIONAL, CAUSAL, SETTINGS, WIDTH, random_mixer, tokens

CPU = torch.device("cpu")
PADDED = torch.ones(4, 60, dtype=torch.int64)  # left, right, between, everywhere
PADDED[0, :13] = PADDED[1, 37:] = PADDED[2, 5:9] = PADDED[2, 30:51] = PADDED[3] = 0


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_rows(name: str) -> None:
    row = MIXERS[name]
    mixer = row.fresh(WIDTH)
    assert isinstance(mixer, Mixer)
    assert (mixer.width, mixer.is_causal) == (WIDTH, row.is_causal)
    other = MIXERS[row.counterpart]
    assert (other.counterpart, other.is_causal) == (name, not row.is_causal)
    assert row.source
    assert dataclasses.is_dataclass(row.config)
    for field in dataclasses.fields(row.config):
        assert field.metadata["help"].endswith(".")
    with pytest.raises(ConfigError, match=f"{name}: expected settings among .*, got 'bands'"):
        row.fresh(WIDTH, {"bands": 2})


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("length", [1, 2, 7, 41, 64])
def test_shape_and_dtype(name: str, length: int) -> None:
    mixer = random_mixer(name)
    x = tokens(2, length, WIDTH)
    y = mixer(x)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()
    half = mixer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - y).norm() < 0.03 * y.norm()


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_reaches_no_bit_of_the_past(name: str) -> None:
    for settings in (SETTINGS[name], None):
        found = leak(MIXERS[name].fresh(WIDTH, settings), WIDTH)
        assert found.before == 0
        assert found.after > 1
    require_causal(MIXERS[name].fresh(WIDTH), WIDTH, name)


@pytest.mark.parametrize("name", CAUSAL)
def test_kernels_long_enough_for_the_fft_are_causal_too(name: str) -> None:
    settings = SETTINGS[name] | {"kernel_length": 600}
    assert leak(MIXERS[name].fresh(4, settings), 4, tokens=700, cuts=(1, 129, 400, 699)).before == 0


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_the_others_see_the_future(name: str) -> None:
    assert leak(MIXERS[name].fresh(WIDTH, SETTINGS.get(name)), WIDTH).before > 1
    with pytest.raises(CausalityError, match=r"layer 3: expected that later tokens.*got changes of .* in"):
        require_causal(MIXERS[name].fresh(WIDTH), WIDTH, "layer 3")


@pytest.mark.parametrize("name", MIXERS)
def test_padding_does_not_leak(name: str) -> None:
    mixer, mask = random_mixer(name), PADDED
    x = tokens(4, 60, WIDTH)
    y = mixer(x.masked_fill(mask[..., None] == 0, torch.nan), mask)
    assert torch.equal(y, y * mask[..., None])
    for sequence, real, got in zip(x, mask.bool(), y, strict=True):
        if real.any():
            close(got[real], mixer(sequence[real][None])[0])
    assert torch.equal(mixer(x, torch.ones(4, 60)), mixer(x))


@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_equals_the_whole(name: str) -> None:
    mixer, x = random_mixer(name), tokens(3, 60, WIDTH)
    y = mixer(x)
    for prompt in (1, 16, 37):
        cache = mixer.new_cache(3, CPU, x.dtype)
        first = mixer(x[:, :prompt], None, cache)
        sizes = {key: state.shape for key, state in cache.states.items()}
        rest = [mixer(x[:, t : t + 1], None, cache) for t in range(prompt, 58)]
        close(torch.cat([first, *rest, mixer(x[:, 58:], None, cache)], 1), y)
        assert cache.lengths.tolist() == [60] * 3
        assert {key: state.shape for key, state in cache.states.items()} == sizes


@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_of_padded_prompts(name: str) -> None:
    mixer, mask = random_mixer(name), PADDED
    x = tokens(4, 60, WIDTH)
    cache = mixer.new_cache(4, CPU, x.dtype)
    parts = [mixer(x[:, a:b], mask[:, a:b], cache) for a, b in ((0, 25), (25, 26), (26, 60))]
    close(torch.cat(parts, 1), mixer(x, mask))
    assert cache.lengths.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("name", CAUSAL)
def test_sequences_of_a_cache_can_be_reordered(name: str) -> None:
    mixer, x = random_mixer(name), tokens(3, 30, WIDTH)
    cache = mixer.new_cache(3, CPU, x.dtype)
    mixer(x[:, :20], None, cache)
    rows = torch.tensor([2, 0, 0, 1])
    cache.replace(cache.select(rows))
    close(mixer(x[rows, 20:], None, cache), mixer(x)[rows, 20:])


@pytest.mark.parametrize("name", MIXERS)
def test_gradients(name: str) -> None:
    settings = {key: min(int(value), 6) for key, value in SETTINGS.get(name, {}).items()}
    mixer = random_mixer(name, 4, settings).double()
    x = tokens(1, 9, 4, dtype=torch.float64).requires_grad_()
    names, parameters = zip(*mixer.named_parameters(), strict=True) if list(mixer.parameters()) else ((), ())
    mask = torch.ones(1, 9)
    mask[0, 4] = 0

    def output(x: Tensor, *values: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x, mask))
        return y

    assert torch.autograd.gradcheck(output, (x, *parameters), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("name", MIXERS)
def test_inputs_that_do_not_fit(name: str) -> None:
    mixer = MIXERS[name].fresh(WIDTH)
    for shape in ((2, WIDTH), (0, 4, WIDTH), (2, 0, WIDTH), (2, 4, 8)):
        with pytest.raises(ShapeError, match=r"mixer: expected floating x \[B, T, 16\]"):
            mixer(torch.zeros(shape))
    with pytest.raises(ShapeError, match=r"expected floating .*int64"):
        mixer(torch.zeros(2, 4, WIDTH, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"mixer: expected a mask \(2, 4\) for this x, got \(2, 3\)"):
        mixer(torch.zeros(2, 4, WIDTH), torch.ones(2, 3))


@pytest.mark.parametrize("name", MIXERS)
def test_caches_that_do_not_fit(name: str) -> None:
    row = MIXERS[name]
    causal = row if row.is_causal else MIXERS[row.counterpart]
    cache = causal.fresh(WIDTH).new_cache(3, CPU, torch.float32)
    if row.is_causal:
        with pytest.raises(ShapeError, match="expected 3 sequences, as the cache has, got 2"):
            row.fresh(WIDTH)(torch.zeros(2, 4, WIDTH), None, cache)
    else:
        with pytest.raises(CausalityError, match="expected a causal mixer to decode with a cache"):
            row.fresh(WIDTH)(torch.zeros(3, 4, WIDTH), None, cache)
        with pytest.raises(CausalityError, match="looks at later tokens"):
            row.fresh(WIDTH).new_cache(3, CPU, torch.float32)


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("causal_fnet", {"kernel_length": 7}, "kernel_length 7: expected even lengths"),
        ("causal_fnet", {"kernel_length": 0}, "kernel_length: expected 2 or more, got 0"),
        ("fftnet", {"heads": 3}, "heads: expected a divisor of the width, 16, got 3"),
        ("fftnet", {"bins": 1}, "bins: expected 2 or more, got 1"),
        ("fftnet", {"mlp_hidden_dim": 0}, "mlp_hidden_dim: expected 1 or more, got 0"),
        ("fftnet", {"init_std": -1.0}, "init_std: expected 0 or more, got -1"),
        ("causal_fftnet", {"kernel_length": 1}, "kernel_length: expected 2 or more, got 1"),
        ("causal_fftnet", {"chunk": 0}, "chunk: expected 1 or more, got 0"),
        ("spectral_mixing", {"bins": 1}, "bins: expected 2 or more, got 1"),
        ("causal_spectral_mixing", {"kernel_length": 0}, "kernel_length: expected 1 or more, got 0"),
        ("spectral_mlp", {"mlp_ratio": 0.0}, r"mlp_ratio: expected [\d.e-]+ or more, got 0"),
        ("spectral_mlp", {"dropout": 1.5}, r"dropout: expected 0 to 1, got 1\.5"),
        ("hybrid", {"heads": 5}, "heads: expected a divisor of the width, 16, got 5"),
        ("hybrid", {"window": 1}, "window: expected 2 or more, got 1"),
        ("causal_hybrid", {"window": 0}, "window: expected 1 or more, got 0"),
    ],
)
def test_settings_out_of_range(name: str, settings: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MIXERS[name].fresh(WIDTH, settings)
