"""Swapping attention for mixers in models of every family: warm start, causality, padding, caches, errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from spectral_surgery.commands.settings import FitSettings
from spectral_surgery.commands.swap.fit_layers import SwappedPair, distill
from spectral_surgery.errors import CausalityError, ConfigError, TargetError
from spectral_surgery.hf.fftnet.models import cache_name
from spectral_surgery.live.families import FAMILIES, sites
from spectral_surgery.live.swap import shared_copy, swap_attention
from spectral_surgery.live.swapped import SwappedAttention, real_tokens
from spectral_surgery.mixers import MIXERS, require_causal
from tests.support.swappable import CAUSAL, inputs_of, logits, mixer_of, model_of, shake

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

TEXT = [family for family in FAMILIES if family != "vit"]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_layer_starts_as_attention_that_sees_its_own_token(family: str) -> None:
    model = model_of(family)
    site = sites(model)[1]
    value, output = site.projections()
    x = torch.randn(2, 5, site.output.weight.shape[0 if family != "gpt2" else 1])
    one = inputs_of(family, tokens=1)
    expected = logits(model, one)
    swapped = swap_attention(model, mixer_of(family), [1])
    torch.testing.assert_close(swapped[1](x)[0], output(value(x)))
    if family == "vit":
        assert logits(model, one).shape == expected.shape
    else:
        torch.testing.assert_close(logits(model, one), expected)  # a single token is all that attention can see


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_chosen_layers_change(family: str) -> None:
    model = model_of(family)
    before, inputs = logits(model, inputs_of(family)), inputs_of(family)
    student = shared_copy(model)
    own = dict(model.named_parameters())
    swapped = swap_attention(student, mixer_of(family), [0])
    shake(student)
    kinds = [isinstance(module, SwappedAttention) for module in student.modules()]
    assert sum(kinds) == 1
    assert list(swapped) == [0]
    after = logits(student, inputs)
    assert after.shape == before.shape
    assert not torch.equal(after, before)
    assert torch.equal(logits(model, inputs), before)
    for name, parameter in student.named_parameters():
        assert (name in own and parameter is own[name]) != (".projected." in name), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_stands_in_a_model(mixer: str) -> None:
    family = "llama" if MIXERS[mixer].is_causal else "bert"
    model = model_of(family)
    swapped = swap_attention(model, mixer, [0, 1])
    shake(model)
    assert logits(model, inputs_of(family)).isfinite().all()
    assert swapped[0].projected.is_causal == MIXERS[mixer].is_causal


@pytest.mark.parametrize("family", CAUSAL)
def test_later_tokens_change_no_earlier_output(family: str) -> None:
    model = model_of(family)
    swapped = swap_attention(model, "causal_fftnet", [0, 1], {"chunk": 4})
    shake(model)
    require_causal(swapped[0].projected, swapped[0].projected.width, family)
    inputs = inputs_of(family)
    before = logits(model, inputs)
    inputs["input_ids"][:, 9:] += 1
    after = logits(model, inputs)
    assert torch.equal(after[:, :9], before[:, :9])
    assert not torch.equal(after[:, 9:], before[:, 9:])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", TEXT)
def test_padding_does_not_leak(family: str, implementation: str) -> None:
    model = model_of(family, attn_implementation=implementation)
    swap_attention(model, mixer_of(family), [0, 1])
    shake(model)
    ids = inputs_of(family)["input_ids"]
    alone = model.base_model(input_ids=ids[:1, :7]).last_hidden_state
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    ids[0, 7:] = 0
    batch = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(batch[:1, :7], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "choice"),
    [
        *((family, {}) for family in ("sliding", *CAUSAL)),
        *((family, {"num_beams": 3}) for family in ("sliding", "llama")),
        ("gpt2", {"do_sample": True, "num_return_sequences": 2}),
    ],
)
def test_generation_with_the_cache_is_generation_without(family: str, choice: dict[str, object]) -> None:
    settings = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0} if family == "sliding" else {}
    family = "qwen2" if family == "sliding" else family
    model = model_of(family, **settings)
    swap_attention(model, "causal_hybrid", [0], {"window": 4, "kernel_length": 6})
    shake(model)
    ids = inputs_of(family)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # on the left, as generation wants it
    found = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, use_cache=use_cache, **choice))
    assert torch.equal(*found)


def test_caches_that_cannot_be_followed() -> None:
    from transformers import DynamicCache, StaticCache

    model = model_of("llama")
    swap_attention(model, "causal_fnet", [1])
    ids = inputs_of("llama")["input_ids"]
    with pytest.raises(ConfigError, match=r"layer 1: expected a dynamic cache, got one with room for 40 tokens"):
        model(ids, **{cache_name(): StaticCache(model.config, max_cache_len=40)})
    cache = DynamicCache(config=model.config)
    model(ids, **{cache_name(): cache})
    cache.crop(-2)
    with pytest.raises(ConfigError, match=r"got one of 10 tokens, of which the mixer has seen 12"):
        model(ids[:, :1], **{cache_name(): cache})


def test_masks() -> None:
    x = torch.zeros(2, 3, 4)
    assert real_tokens(None, x) is None
    flat = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    assert real_tokens(flat, x).tolist() == [[True, True, True], [True, True, False]]
    least = torch.finfo(torch.float32).min
    causal = torch.full((3, 4), least).triu(2)[None, None]
    causal = causal.expand(2, 1, 3, 4).clone()
    causal[1, :, :, 3] = least
    assert real_tokens(causal, x).tolist() == [[True, True, True], [True, True, False]]
    assert real_tokens(causal[:1, :, 2:], x).all()
    with pytest.raises(ConfigError, match=r"attention mask: expected \[B, tokens\] or .*, got \[3\]"):
        real_tokens(torch.ones(3), x)
    with pytest.raises(ConfigError, match=r"got list\. Load the model with attn_implementation='sdpa'"):
        real_tokens([1], x)


def test_what_is_refused() -> None:
    model = model_of("bert")
    with pytest.raises(ConfigError, match=r"layers: expected 0 to 1 for this model, got 2"):
        swap_attention(model, "fnet", [0, 2])
    with pytest.raises(ConfigError, match=r"layers: expected one or more different numbers, got \[1, 1\]"):
        swap_attention(model, "fnet", [1, 1])
    with pytest.raises(ConfigError, match=r"layers: expected one or more different numbers, got \[\]"):
        swap_attention(model, "fnet", [])
    with pytest.raises(ConfigError, match=r"mixer: expected one of fnet,.*got 'fnt'.*Did you mean 'fnet'"):
        swap_attention(model, "fnt", [0])
    with pytest.raises(ConfigError, match=r"fftnet: expected settings among bins,.*got 'head'"):
        swap_attention(model, "fftnet", [0], {"head": 2})
    with pytest.raises(ConfigError, match=r"heads: expected a divisor of the width, 64, got 7"):
        swap_attention(model, "fftnet", [0], {"heads": 7})
    model.config.model_type = "t5"
    with pytest.raises(
        ConfigError, match=r"model family: expected one of bert, roberta, vit, gpt2, llama, qwen2.* got 't5'"
    ):
        swap_attention(model, "fnet", [0])


@pytest.mark.parametrize("family", CAUSAL)
def test_a_mixer_that_sees_the_future_is_refused_where_it_must_not(family: str) -> None:
    with pytest.raises(CausalityError, match=rf"got fnet, which lets a token see .*{family} .*Use causal_fnet"):
        swap_attention(model_of(family), "fnet", [0])


def test_a_decoder_of_an_encoder_family_is_causal() -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertLMHeadModel(BertConfig(vocab_size=96, is_decoder=True, **sizes)).eval()
    with pytest.raises(CausalityError, match="later ones: bert predicts them"):
        swap_attention(model, "hybrid", [0])
    swap_attention(model, "causal_hybrid", [0])
    assert logits(model, inputs_of("bert")).isfinite().all()


def test_attention_that_is_not_dense() -> None:
    model = model_of("llama")
    model.model.layers[0].self_attn.v_proj = nn.Bilinear(2, 2, 2)
    with pytest.raises(TargetError, match=r"layers.0.self_attn.v_proj: expected a dense linear layer, got a Bilinear"):
        swap_attention(model, "causal_fnet", [0])


@pytest.mark.parametrize(("family", "stages"), [("bert", (12, 0)), ("llama", (0, 12)), ("bert", (0, 12))])
def test_distillation_brings_new_layers_closer(family: str, stages: tuple[int, int]) -> None:
    model = model_of(family)
    for parameter in model.parameters():
        parameter.data *= 3  # attention that matters
    student = shared_copy(model)
    swapped = swap_attention(student, mixer_of(family), [0, 1])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batches, seen = [inputs_of(family, tokens=9)], []

    def distance() -> float:
        return float((student.base_model(**batches[0])[0] - model.base_model(**batches[0])[0]).square().mean())

    far = distance()
    settings = FitSettings(*stages, learning_rate=1e-2, end_to_end_learning_rate=1e-2)
    fits = distill(SwappedPair(model, student, swapped), batches, batches, settings, lambda *said: seen.append(said))
    assert [fit.layer for fit in fits] == [0, 1]
    if stages[0]:
        assert all(fit.after < 0.9 * fit.before for fit in fits)
    else:
        assert distance() < 0.9 * far
    assert [done for done, _, _ in seen] == list(range(1, 13))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_distillation_needs_text() -> None:
    model = model_of("bert")
    pair = SwappedPair(model, student := shared_copy(model), swap_attention(student, "fnet", [0]))
    with pytest.raises(ConfigError, match=r"distill: expected batches to train on and to hold out, got 0 and 1"):
        distill(pair, [], [inputs_of("bert")], FitSettings(), lambda *_: None)
