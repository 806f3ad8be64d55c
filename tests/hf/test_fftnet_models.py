"""FFTNet in transformers: causality, padding, saving, generation with a cache, training, and what is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_surgery.errors import CausalityError, ConfigError, ShapeError
from spectral_surgery.hf.fftnet import models as fftnet_models
from spectral_surgery.hf.fftnet.models import cache_name
from spectral_surgery.hf.fftnet.parts import places, sinusoids

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIZES: dict[str, Any] = {
    **{"vocab_size": 40, "d_model": 16, "num_layers": 2, "num_heads": 4, "mlp_hidden_dim": 8, "max_seq_length": 64},
    **{"kernel_length": 12, "chunk": 5, "pad_token_id": 0, "eos_token_id": None, "num_labels": 3},
}
CAUSAL, MASKED, CLASSIFIER = "FFTNetForCausalLM", "FFTNetForMaskedLM", "FFTNetForSequenceClassification"
ALL = (CAUSAL, MASKED, CLASSIFIER)


def config(**changes: Any) -> Any:
    return fftnet_models.FFTNetConfig(**SIZES | changes)


def model(name: str = CAUSAL, **changes: Any) -> Any:
    """Every parameter random, so that every path counts."""
    made = getattr(fftnet_models, name)(config(**changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def ids(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(made: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    found: Tensor = made(tokens, attention_mask=mask).logits
    return found


@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 64])
@pytest.mark.parametrize("name", ALL)
def test_shapes(name: str, tokens: int) -> None:
    expected = (2, 3) if name == CLASSIFIER else (2, tokens, 40)
    assert logits(model(name), ids(2, tokens)).shape == expected


@pytest.mark.parametrize(
    "changes", [{"layer_norm": False}, {"sinusoidal_positions": False}, {"d_model": 15, "num_heads": 3}]
)
def test_settings_change_the_model(changes: dict[str, Any]) -> None:
    names = {key for key, _ in model(**changes).named_parameters()}
    assert any("norm.weight" in key and "filter" not in key for key in names) != ("layer_norm" in changes)
    assert logits(model(**changes), ids(1, 9)).isfinite().all()
    if "sinusoidal_positions" in changes:  # a causal filter alone does not know where it is, once it is full
        same = torch.full((1, 64), 7)
        far = logits(model(**changes, chunk=64), same)[0]
        torch.testing.assert_close(far[40], far[50])
        assert not torch.allclose(*logits(model(chunk=64), same)[0, [40, 50]])


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 30, 63])
def test_a_causal_model_does_not_see_the_future(cut: int) -> None:
    made, tokens = model(), ids(1, 64)
    changed = torch.cat((tokens[:, :cut], ids(1, 64 - cut, seed=3)), 1)
    before, after = logits(made, tokens), logits(made, changed)
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize("name", [MASKED, CLASSIFIER])
def test_an_encoder_sees_both_ways(name: str) -> None:
    made, tokens = model(name), ids(1, 20)
    changed = torch.cat((tokens[:, :-1], (tokens[:, -1:] + 1) % 40), 1)
    assert (logits(made, tokens)[0, 0] != logits(made, changed)[0, 0]).any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_padding_does_not_leak(name: str, side: str) -> None:
    made, tokens = model(name), ids(2, 11)
    fill = ids(2, 6, seed=4)
    parts = (fill, tokens) if side == "left" else (tokens, fill)
    mask = torch.cat([torch.full_like(part, int(part is tokens)) for part in parts], 1)
    got = logits(made, torch.cat(parts, 1), mask)
    if name != CLASSIFIER:
        got = got[:, 6:] if side == "left" else got[:, :11]
    torch.testing.assert_close(got, logits(made, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    made, tokens = model(name), ids(2, 13)
    made.save_pretrained(tmp_path)
    auto = getattr(transformers, name.replace("FFTNet", "AutoModel"))
    for own in (getattr(fftnet_models, name), auto):
        again = own.from_pretrained(tmp_path)
        assert type(again) is getattr(fftnet_models, name)
        assert torch.equal(logits(again, tokens), logits(made, tokens))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (loaded.d_model, loaded.hidden_size, loaded.chunk, loaded.is_causal) == (16, 16, 5, name == CAUSAL)
    base, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        torch.testing.assert_close(base(tokens)[0], made.model(tokens)[0], rtol=0, atol=0)
    assert torch.equal(logits(pickle.loads(pickle.dumps(made)), tokens), logits(made, tokens))


def test_a_fresh_model_starts_with_open_filters() -> None:
    made = fftnet_models.FFTNetForCausalLM(config(init_std=0.0))
    for block in made.model.blocks:
        own = block.mixer.mixer.filter
        assert torch.equal(own.filter[..., 0], torch.ones(4, 7))
        assert not own.filter[..., 1].any()
        assert not own.down.weight.any()
    assert made.lm_head.weight is made.model.embed_tokens.weight
    apart = fftnet_models.FFTNetForCausalLM(config(tie_word_embeddings=False))
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight


@torch.no_grad()
def greedy(made: Any, tokens: Tensor, count: int) -> Tensor:
    for _ in range(count):
        tokens = torch.cat((tokens, made(tokens).logits[:, -1:].argmax(-1)), 1)
    return tokens


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompt", [1, 4, 5, 14])
def test_generate_writes_what_a_plain_loop_writes(prompt: int, use_cache: bool) -> None:
    made, tokens = model(), ids(3, prompt)
    made_tokens = made.generate(tokens, max_new_tokens=20, do_sample=False, use_cache=use_cache)
    assert torch.equal(made_tokens, greedy(made, tokens, 20))


def test_generate_with_padding_on_the_left() -> None:
    made, tokens = model(), ids(2, 9)
    row = torch.cat((torch.zeros(1, 4, dtype=torch.long), tokens[1:, :5]), 1)
    batch = torch.cat((tokens[:1], row))
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    both = made.generate(batch, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(both[:1], greedy(made, tokens[:1], 12))
    assert torch.equal(both[1:, 4:], greedy(made, tokens[1:, :5], 12))


def test_beams_keep_their_own_memory() -> None:
    made, tokens = model(), ids(2, 6)
    settings: dict[str, Any] = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    with_cache, without = (made.generate(tokens, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_a_cache_is_continued_by_many_tokens_at_once() -> None:
    made, tokens = model(), ids(2, 23)
    with torch.no_grad():
        first = made(tokens[:, :8], use_cache=True)
        second = made(tokens[:, 8:], **{cache_name(): first[cache_name()]})
    assert second[cache_name()].get_seq_length() == 23
    together = torch.cat((first.logits, second.logits), 1)
    torch.testing.assert_close(together, logits(made, tokens), rtol=1e-4, atol=1e-5)


def test_logits_to_keep_and_hidden_states() -> None:
    made, tokens = model(), ids(1, 7)
    with torch.no_grad():
        out = made(tokens, logits_to_keep=2, output_hidden_states=True)
    torch.testing.assert_close(out.logits, logits(made, tokens)[:, -2:])  # a product of two rows may round otherwise
    assert [tuple(state.shape) for state in out.hidden_states] == [(1, 7, 16)] * 3
    assert isinstance(made(tokens, return_dict=False), tuple)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_every_parameter_gets_a_gradient(name: str, checkpointing: bool) -> None:
    made, tokens = model(name, dropout=0.0).train(), ids(2, 12)
    if checkpointing:
        made.gradient_checkpointing_enable()
    labels = torch.tensor([0, 2]) if name == CLASSIFIER else tokens
    loss = made(tokens, labels=labels).loss
    loss.backward()
    assert loss > 0
    assert not [key for key, own in made.named_parameters() if own.grad is None or not own.grad.abs().sum() > 0]


def test_the_loss_is_that_of_the_next_token() -> None:
    made, tokens = model(), ids(2, 9)
    with torch.no_grad():
        loss = made(tokens, labels=tokens).loss
    expected = torch.nn.functional.cross_entropy(logits(made, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ALL)
def test_the_trainer_trains(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    made = getattr(fftnet_models, name)(config(dropout=0.0))
    rows = ids(8, 10)
    labels = torch.arange(8) % 3 if name == CLASSIFIER else rows
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        **{"max_steps": 12, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True},
        **{
            "save_strategy": "no",
            "disable_tqdm": True,
            "per_device_train_batch_size": 8,
            "lr_scheduler_type": "constant",
        },
    )
    trainer = transformers.Trainer(model=made, args=arguments, train_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_bfloat16_stays_bfloat16() -> None:
    made = model().to(torch.bfloat16)
    found = logits(made, ids(1, 20))
    assert found.dtype == torch.bfloat16
    assert (found.float() - logits(model(), ids(1, 20))).abs().mean() < 0.2
    assert made.generate(ids(1, 4), max_new_tokens=5, do_sample=False).shape == (1, 9)


def test_sinusoids_are_those_of_the_paper() -> None:
    at = torch.tensor([[0, 3]])
    found = sinusoids(at, 5)
    angles = [3 / 10_000 ** (2 * (i // 2) / 5) for i in range(5)]
    expected = [torch.tensor(a).sin() if i % 2 == 0 else torch.tensor(a).cos() for i, a in enumerate(angles)]
    torch.testing.assert_close(found[0, 1], torch.stack(expected))
    assert found[0, 0].tolist() == [0, 1, 0, 1, 0]
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    assert places(mask, mask, torch.tensor([0, 5]), 9).tolist() == [[0, 0, 1], [5, 5, 6]]


@pytest.mark.parametrize(
    ("tokens", "mask", "error", "text"),
    [
        (ids(1, 65), None, ShapeError, "input_ids: expected at most 64 tokens, the model's max_seq_length, got 65"),
        (
            torch.zeros(0, 5, dtype=torch.long),
            None,
            ShapeError,
            r"input_ids: expected \[B, T\] with at.*got shape \(0, 5\)",
        ),
        (torch.zeros(2, 0, dtype=torch.long), None, ShapeError, r"input_ids: expected \[B, T\].*got shape \(2, 0\)"),
        (torch.tensor([[1, 40]]), None, ConfigError, "input_ids: expected 0 to 39, got token 40.*Use the tokenizer"),
        (torch.tensor([[1, -1]]), None, ConfigError, "input_ids: expected 0 to 39, got token -1"),
        (
            ids(1, 5),
            torch.ones(1, 4),
            ShapeError,
            r"attention_mask: expected \(1, 5\), the shape of input_ids, got \(1, 4\)",
        ),
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_bad_input(name: str, tokens: Tensor, mask: Tensor | None, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as found:
        logits(model(name), tokens, mask)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"d_model": 0}, "FFTNetConfig: expected d_model of at least 1, got 0"),
        ({"vocab_size": 0}, "FFTNetConfig: expected vocab_size of at least 1, got 0"),
        ({"num_layers": 0}, "FFTNetConfig: expected num_layers of at least 1, got 0"),
        ({"max_seq_length": 0}, "FFTNetConfig: expected max_seq_length of at least 1, got 0"),
        ({"dropout": 1.0}, r"FFTNetConfig: expected dropout of at least 0 and less than 1, got 1\.0"),
        ({"num_heads": 3}, "heads: expected a divisor of the width, 16, got 3"),
        ({"kernel_length": 1}, "kernel_length: expected 2 or more, got 1"),
        ({"is_causal": False}, "FFTNetForCausalLM: expected is_causal True in the configuration, got False"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        fftnet_models.FFTNetForCausalLM(config(**changes))


def test_an_encoder_cannot_generate_and_a_sequence_has_an_end() -> None:
    with pytest.raises(CausalityError, match="expected a causal mixer to decode with a cache"):
        model(MASKED).model(ids(1, 3), use_cache=True)
    with pytest.raises(ShapeError, match="input_ids: expected at most 64 tokens, the model's max_seq_length, got 65"):
        model().generate(ids(1, 60), max_new_tokens=6, do_sample=False)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fftnet_models.nothing  # noqa: B018 - reading it is the test


@pytest.mark.slow
def test_a_folder_is_known_without_asking_for_the_classes(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    code = (
        "import sys, spectral_surgery; assert 'transformers' not in sys.modules\n"
        "import transformers\n"
        f"made = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "assert type(made).__name__ == 'FFTNetForCausalLM'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
