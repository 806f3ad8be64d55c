"""Weights that are computed again on the way back: the same gradients, and no dense weight in between."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.heal.gradient_checkpointing import recomputed_weights
from spectral_surgery.layers.kept_spectrum import KeptSpectrum
from spectral_surgery.live.trained_spectra import train_kept


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 64))
    spectra = {
        name: [encode(own, Target("density", 0.2))[0].decode()]
        for name, own in layers.named_parameters()
        if own.ndim == 2
    }
    train_kept(layers, spectra)
    return layers


def gradients(layers: nn.Module, *, again: bool) -> tuple[list[Tensor], Tensor, list[int]]:
    x = torch.randn(32, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kept: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved.numel())
        return saved

    if again:
        with recomputed_weights(layers):
            loss = layers(x).square().sum()
    else:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda own: own):
            loss = layers(x).square().sum()
    found = torch.autograd.grad(loss, [x, *(own for own in layers.parameters() if own.requires_grad)])
    return list(found[1:]), found[0], kept


def test_gradients_are_the_same_bits() -> None:
    layers = model()
    plain, plain_x, _ = gradients(layers, again=False)
    again, again_x, _ = gradients(layers, again=True)
    assert torch.equal(plain_x, again_x)
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))
    assert float(plain[0].abs().sum()) > 0


def test_every_weight_is_computed_on_both_ways_and_on_none_afterwards() -> None:
    layers, calls = model(), []
    hooks = [own.register_forward_hook(lambda *_: calls.append(1)) for own in layers.modules() if _is_kept(own)]
    gradients(layers, again=False)
    assert len(calls) == 2
    calls.clear()
    gradients(layers, again=True)
    assert len(calls) == 4
    for hook in hooks:
        hook.remove()
    assert not any(own._forward_hooks for own in layers.modules())


def test_a_tensor_in_the_place_of_a_weight_that_is_gone_is_kept() -> None:
    layers = model()
    with recomputed_weights(layers):
        for _ in range(20):  # freed weights leave room of just the size of these
            layers(torch.randn(32, 96))
            x = torch.randn(160, 96, requires_grad=True)
            value = x.detach().square() * 2
            (x * value).sum().backward()
            assert x.grad is not None
            torch.testing.assert_close(x.grad, value)


def _is_kept(module: nn.Module) -> bool:
    return isinstance(module, KeptSpectrum)
