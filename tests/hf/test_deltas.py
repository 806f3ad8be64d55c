"""Differences on a live model: the fine-tunes that decompress gives, in turn, and the base again, bit by bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectral_surgery import load_compressed, switch_delta
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from tests.support.compressed import FAMILIES, dense_model, output

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

OPTIONS = CompressOptions(Target("bits", 4.0), min_weights=1000)


def tuned(family: str, folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A fine-tune of the random model of a family: every number is moved."""
    model, generator = dense_model(family).to(dtype), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += (0.01 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    model.save_pretrained(folder)
    return folder


def made(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, list[Path]]:
    """A base, and differences of two fine-tunes to it."""
    dense_model(family).to(dtype).save_pretrained(folder / "base")
    deltas = []
    for seed in (1, 2):
        source = tuned(family, folder / f"tuned-{seed}", seed, dtype)
        compress(source, folder / f"delta-{seed}", OPTIONS, base=folder / "base")
        deltas.append(folder / f"delta-{seed}")
    return folder / "base", deltas


def plain(family: str, folder: Path) -> Any:
    return getattr(transformers, FAMILIES[family][1]).from_pretrained(folder).eval()


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() <= 1e-5 * expected.norm())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_fine_tune_after_the_other_and_the_base_again(tmp_path: Path, family: str) -> None:
    base, deltas = made(family, tmp_path)
    model = plain(family, base)
    before, first = state(model), output(model)
    for delta in (*deltas, deltas[0]):
        decompress(delta, tmp_path / f"whole-{delta.name}", base=base, overwrite=True)
        switch_delta(model, delta, base=base)
        expected = output(plain(family, tmp_path / f"whole-{delta.name}"))
        assert close(output(model), expected)
        assert not close(first, expected)
    switch_delta(model, None)
    assert torch.equal(output(model), first)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    switch_delta(model, None)  # once more changes nothing
    assert torch.equal(output(model), first)


def test_load_compressed_puts_a_difference_on_a_plain_base(tmp_path: Path) -> None:
    base, (delta, _) = made("llama", tmp_path, torch.bfloat16)
    decompress(delta, tmp_path / "whole", base=base)
    model = load_compressed(base, delta=delta, dtype=torch.float32)
    expected = plain("llama", tmp_path / "whole").float()
    # bfloat16 files hold the sum rounded to 8 bits
    assert float((output(model) - output(expected)).norm() / output(expected).norm()) < 2**-8
    assert not model.training


def test_a_base_that_is_held_compressed_keeps_its_error_and_its_codes(tmp_path: Path) -> None:
    base, deltas = made("llama_tied", tmp_path)
    compress(base, tmp_path / "base-4bit", OPTIONS)
    model = load_compressed(tmp_path / "base-4bit")
    before, first = state(model), output(model)
    decompress(tmp_path / "base-4bit", tmp_path / "decoded")
    for delta in deltas:
        switch_delta(model, delta)
        expected = plain("llama_tied", tmp_path / "decoded")
        decompress(delta, tmp_path / "whole", base=base, overwrite=True)
        whole, dense = plain("llama_tied", tmp_path / "whole"), plain("llama_tied", base)
        for one, other, own in zip(whole.parameters(), dense.parameters(), expected.parameters(), strict=True):
            own.data += one.data - other.data
        assert close(output(model), output(expected))
    switch_delta(model, None)
    assert torch.equal(output(model), first)
    assert all(torch.equal(state(model)[name], tensor) for name, tensor in before.items())
    again = load_compressed(tmp_path / "base-4bit", delta=deltas[1])
    switch_delta(model, deltas[1])
    assert torch.equal(output(again), output(model))


def test_takes_the_memory_of_the_difference_and_no_second_base(tmp_path: Path) -> None:
    base, (delta, _) = made("llama", tmp_path)
    model = plain("llama", base)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters() if parameter.ndim == 2}
    switch_delta(model, delta, resident="coded")
    assert {name: p.data_ptr() for name, p in model.named_parameters() if p.ndim == 2} == pointers
    assert len(list(model.parameters())) == len(list(plain("llama", base).parameters()))


def test_what_does_not_fit_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    base, (delta, _) = made("llama", tmp_path)
    model = plain("llama", base)
    switch_delta(model, delta)
    now = output(model)
    compress(base, tmp_path / "whole", OPTIONS)
    other = tuned("llama", tmp_path / "other", 3)
    gpt2, _ = made("gpt2", tmp_path / "gpt2")
    compress(tmp_path / "gpt2" / "tuned-1", tmp_path / "of-gpt2", OPTIONS, base=gpt2)
    for folder, against, words in (
        (tmp_path / "whole", None, "whole: expected differences to a base, got a whole model"),
        (delta, other, "expected the base that delta-1 holds differences to"),
        (tmp_path / "of-gpt2", None, "has no place in it"),
    ):
        with pytest.raises(CheckpointError, match=words) as error:
            switch_delta(model, folder, base=against)
        assert "\n" not in str(error.value)
        assert torch.equal(output(model), now)
    with pytest.raises(ConfigError, match="int7"):
        switch_delta(model, delta, resident="int7")


def test_damaged_differences_leave_the_base(tmp_path: Path) -> None:
    base, (delta, _) = made("llama", tmp_path)
    model = plain("llama", base)
    first = output(model)
    tensors = load_file(delta / "model.safetensors")
    name = max((name for name in tensors if name.endswith("spectral_codes")), key=lambda name: tensors[name].numel())
    tensors[name][100] ^= 255
    shutil.copytree(delta, tmp_path / "damaged")
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="expected part 0 with its checksum, got another one"):
        switch_delta(model, tmp_path / "damaged")
    assert torch.equal(output(model), first)


def test_two_weights_of_a_fine_tune_need_two_in_the_base(tmp_path: Path) -> None:
    base, _ = made("llama", tmp_path)
    one = load_file(base / "model.safetensors")
    one["lm_head.weight"] = one["model.embed_tokens.weight"].clone()
    shutil.copytree(base, tmp_path / "tied")
    save_file(one, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    compress(tmp_path / "tied", tmp_path / "delta", OPTIONS, base=base)
    model = plain("llama", base)
    with pytest.raises(CheckpointError, match=r"one tied to .*decompress gives the fine-tune as a model\.$"):
        switch_delta(model, tmp_path / "delta")


def test_experts_that_are_held_compressed_are_named(tmp_path: Path) -> None:
    base, (delta, _) = made("qwen3_moe", tmp_path)
    compress(base, tmp_path / "base-4bit", OPTIONS)
    model = load_compressed(tmp_path / "base-4bit")
    with pytest.raises(ConfigError, match=r"experts\S*: expected a dense weight .*Load the plain base"):
        switch_delta(model, delta)
