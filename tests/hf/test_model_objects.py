"""A compressed model is copied, moved between processes, counted, cast and resized as any other model."""

from __future__ import annotations

import copy
import io
import logging
import multiprocessing
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import spectral_surgery
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.hf import swapped_models
from spectral_surgery.hf.quantizer.fill_weights import Loading, retie, untie
from spectral_surgery.hf.quantizer.loading_plan import Plan
from spectral_surgery.hf.quantizer.saving import spectral_layers
from spectral_surgery.matmul import HostMatrix
from tests.support.compressed import FAMILIES, LLAMA, compressed_folder, dense_model, output, save_tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
LANGUAGE = ("llama", "llama_tied", "bert", "gpt2", "qwen3_moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compressed folders of all families."""
    return {family: compressed_folder(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers' logger has said, which it does not pass on."""
    own = logging.getLogger("transformers")
    own.addHandler(caplog.handler)
    yield caplog
    own.removeHandler(caplog.handler)


def load(family: str, folder: Path, **settings: Any) -> Any:
    return getattr(transformers, FAMILIES[family][1]).from_pretrained(folder, **settings).eval()


def olmo(folder: Path) -> Path:
    """A compressed model of which nothing but matrices has numbers: its norms have no weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.OlmoForCausalLM(transformers.OlmoConfig(**LLAMA))
    model.save_pretrained(folder / "source")
    save_tokenizer(folder / "source")
    options = CompressOptions(Target("bits", 4.0), min_weights=1000)
    spectral_surgery.compress(folder / "source", folder / "compressed", options)
    return folder / "compressed"


@pytest.mark.parametrize("family", FAMILIES)
def test_copies(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Deep and shallow ones, pickles and files of torch give the same numbers, and save the same model."""
    model = load(family, folders[family])
    expected, stored = output(model), io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    deep = copy.deepcopy(model)
    copies = [deep, copy.copy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)]
    assert all(torch.equal(output(own), expected) for own in copies)
    assert {type(own) for own in copies} == {type(model)}
    deep.save_pretrained(tmp_path)
    assert torch.equal(output(load(family, tmp_path)), expected)


def test_a_copy_is_independent(folders: dict[str, Path]) -> None:
    model = load("llama_tied", folders["llama_tied"])
    expected, count = output(model), model.num_parameters()
    other = copy.deepcopy(model)
    assert other.lm_head.spectrum is other.model.embed_tokens.spectrum is not model.lm_head.spectrum
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
        other.lm_head.spectrum.forms[0].codes.zero_()
    other.resize_token_embeddings(100)
    assert torch.equal(output(model), expected)
    assert other.num_parameters() == count + 4 * 64
    assert model.num_parameters() == count
    copy.deepcopy(other).dequantize()
    assert list(spectral_layers(other))


def _answer(models: list[Any], to: Any) -> None:
    to.send([(output(model).tolist(), model.num_parameters()) for model in models])


@pytest.mark.slow
def test_goes_to_a_new_process(folders: dict[str, Path]) -> None:
    """Classes that are made at run time are found there: Conv1D, experts, the quantiser and its settings."""
    models = [load(family, folders[family]) for family in ("gpt2", "qwen3_moe")]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(models, there))
    process.start()
    there.close()
    answers = here.recv()
    process.join()
    for model, (answer, count) in zip(models, answers, strict=True):
        assert torch.equal(torch.tensor(answer), output(model))
        assert count == model.num_parameters()


def test_classes_are_found_by_name() -> None:
    from spectral_surgery.hf.quantizer import class_swap as stand_ins
    from spectral_surgery.hf.quantizer import plugin as transformers_plugin

    for module in (transformers_plugin, swapped_models):
        for made in module.METHOD.classes.values():
            assert pickle.loads(pickle.dumps(made)) is made
    for module in (transformers_plugin, swapped_models, stand_ins):
        with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
            module.Nothing  # noqa: B018 - the access is the test


def test_streamed_weights_are_copied_as_they_are(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = spectral_surgery.load_compressed(folders["llama"], "streamed")
    expected, made = output(model), []
    monkeypatch.setattr(HostMatrix, "of", lambda codes: made.append(1) or HostMatrix(codes))
    assert torch.equal(output(copy.deepcopy(model)), expected)
    assert len(made) == 16


def test_is_freed_at_once(folders: dict[str, Path]) -> None:
    """Nothing in it refers to itself, so that its memory does not wait for Python to look for cycles."""
    model = load("llama", folders["llama"])
    gone = weakref.ref(model)
    del model
    assert gone() is None


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_what_weights_stand_for(folders: dict[str, Path], family: str) -> None:
    model, dense = load(family, folders[family]), dense_model(family)
    for settings in ({}, {"exclude_embeddings": True}):
        assert model.num_parameters(**settings) == dense.num_parameters(**settings)
        assert model.base_model.num_parameters(**settings) == dense.base_model.num_parameters(**settings)
    trained = sum(own.numel() for own in model.parameters() if own.requires_grad)
    assert model.num_parameters(only_trainable=True) == trained < model.num_parameters()
    assert model.get_memory_footprint() < dense.get_memory_footprint()


def test_counts_what_is_trained(folders: dict[str, Path]) -> None:
    model = load("llama", folders["llama"])
    before = model.num_parameters()
    spectral_surgery.live.unfreeze_spectra(model)
    kept = sum(own.numel() for name, own in model.named_parameters() if name.endswith("spectrum.values"))
    assert kept
    assert model.num_parameters() == before
    assert model.num_parameters(only_trainable=True) >= kept


def test_a_model_of_nothing_but_matrices(tmp_path: Path) -> None:
    folder = olmo(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert not sum(own.numel() for own in model.parameters())
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.bfloat16)
    ids = torch.arange(3, 9)[None]
    plain = tmp_path / "plain"
    decompress(folder, plain)
    settings = {"max_new_tokens": 4, "do_sample": False}
    dense = transformers.AutoModelForCausalLM.from_pretrained(plain)
    assert torch.equal(model.generate(ids, **settings), dense.generate(ids, **settings))
    said = transformers.pipeline("text-generation", model=str(folder))("w3 w4", **settings)
    assert said == transformers.pipeline("text-generation", model=str(plain))("w3 w4", **settings)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_pipeline(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    folder = folders[family] if family in folders else opt(tmp_path)
    save_tokenizer(folder)
    decompress(folder, tmp_path / "plain")
    texts = [
        transformers.pipeline("text-generation", model=str(path))("w3 w4 w5", max_new_tokens=4, do_sample=False)
        for path in (folder, tmp_path / "plain")
    ]
    assert texts[0] == texts[1]


def opt(folder: Path) -> Path:
    settings = {"vocab_size": 96, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 72, "num_hidden_layers": 2}
    config = transformers.OPTConfig(**settings, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0)
    transformers.OPTForCausalLM(config).save_pretrained(folder / "source")
    options = CompressOptions(Target("bits", 4.0), min_weights=1000)
    spectral_surgery.compress(folder / "source", folder / "compressed", options)
    return folder / "compressed"


def test_a_head_of_another_task(folders: dict[str, Path], said: pytest.LogCaptureFixture) -> None:
    """As with dense files: the body is the compressed one, the head is new, and transformers says so."""
    ids = torch.arange(3, 27).reshape(2, 12)
    body = load("bert", folders["bert"]).bert
    auto = transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(folders["bert"], num_labels=3, output_loading_info=True)
    _, usual = auto.from_pretrained(folders["bert"].parent / "source", num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == usual["missing_keys"]
    assert "classifier.weight" in info["missing_keys"]
    assert "classifier.weight" in said.text
    model.eval()
    with torch.no_grad():
        hidden = [own(ids).last_hidden_state for own in (body, model.bert)]
        assert model(ids).logits.shape == (2, 3)
    assert torch.equal(*hidden)
    assert 0 < float(model.classifier.weight.std().detach()) < 1
    assert model.classifier.weight.requires_grad


@pytest.mark.parametrize("family", ["llama_tied", "bert", "gpt2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dequantize_to_a_dtype(folders: dict[str, Path], family: str, dtype: str) -> None:
    """Parameters get the dtypes that from_pretrained gives, computed in float32 and rounded once."""
    own = getattr(torch, dtype)
    model = load(family, folders[family], dtype=torch.bfloat16)
    expected = load(family, folders[family])
    expected.dequantize()
    model.dequantize(dtype=dtype if family == "bert" else own)
    plain = load(family, folders[family].parent / "source", dtype=own)
    assert {name: p.dtype for name, p in model.named_parameters()} == {n: p.dtype for n, p in plain.named_parameters()}
    assert model.dtype == model.config.dtype == output(model).dtype == own
    for name, weight in expected.named_parameters():
        if weight.ndim == 2 and weight.numel() >= 1000:
            assert torch.equal(model.get_parameter(name), weight.to(own))
    assert not hasattr(model, "hf_quantizer")
    assert model.num_parameters() == plain.num_parameters()


def test_dequantize_keeps_what_transformers_keeps(tmp_path: Path) -> None:
    """T5 has layers that stay in float32 where all else is float16."""
    settings = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 72, "num_layers": 1, "num_heads": 4}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)).save_pretrained(tmp_path / "source")
    options = CompressOptions(Target("bits", 4.0), min_weights=1000)
    spectral_surgery.compress(tmp_path / "source", tmp_path / "out", options)
    model, plain = (
        transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / name, dtype=dtype)
        for name, dtype in (("out", torch.float32), ("source", torch.float16))
    )
    model.dequantize(dtype=torch.float16)
    assert {name: p.dtype for name, p in model.named_parameters()} == {n: p.dtype for n, p in plain.named_parameters()}
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32


@pytest.mark.parametrize("family", LANGUAGE)
def test_more_tokens(folders: dict[str, Path], tmp_path: Path, said: pytest.LogCaptureFixture, family: str) -> None:
    """The embedding and the head become dense, and say so; ties hold; what is saved loads again."""
    model, dense = load(family, folders[family]), dense_model(family)
    before, held = output(model), len(list(spectral_layers(model)))
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.resize_token_embeddings(96) is model.get_input_embeddings()
    assert len(list(spectral_layers(model))) == held
    assert not said.text
    model.resize_token_embeddings(98, pad_to_multiple_of=4)
    dense.resize_token_embeddings(98, pad_to_multiple_of=4)
    assert "decoded to change the number of tokens, and dense from now on" in said.text
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight.shape == (100, 64)
    assert embedding.weight.requires_grad
    tied = dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert (embedding.weight is head.weight) is tied
    assert model.num_parameters() == dense.num_parameters()
    assert len(list(spectral_layers(model))) == held - 2
    after = output(model)
    assert torch.allclose(after[..., :96], before, atol=1e-5)
    model.save_pretrained(tmp_path)
    again, info = getattr(transformers, FAMILIES[family][1]).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(output(again.eval()), after)
    again.dequantize()
    assert torch.allclose(output(again), after, atol=1e-5)


def test_fewer_tokens_where_equal_ends_are_not_tied(tmp_path: Path) -> None:
    """Stored once since they are equal, the embedding and the head go apart when they are decoded."""
    model = dense_model("llama")
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "source")
    options = CompressOptions(Target("bits", 4.0), min_weights=1000)
    spectral_surgery.compress(tmp_path / "source", tmp_path / "out", options)
    model = load("llama", tmp_path / "out")
    model.resize_token_embeddings(90)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(output(load("llama", tmp_path / "again")), output(model))


@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_peft_takes_it(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(family, folders[family]), peft.LoraConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(family, folders[family]), tmp_path).eval()
    assert torch.equal(output(model.eval()), output(again))


def test_dequantize_leaves_parameters_of_a_type_of_their_own(folders: dict[str, Path]) -> None:
    """Some routers are float32 in any model, without a list that says so."""
    model = transformers.AutoModel.from_pretrained(folders["bert"], dtype=torch.bfloat16)
    norm = model.embeddings.LayerNorm
    norm.float()
    model.dequantize(torch.bfloat16)
    assert norm.weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_ties_of_a_model_under_two_names() -> None:
    """What transformers has tied is tied again after a model inside was seen twice."""

    class Twice(transformers.LlamaPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.first = transformers.LlamaForCausalLM(config)
            self.second = self.first
            self.post_init()

    model = Twice(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))
    inside, every = dict(model.first._tied_weights_keys), dict(model.all_tied_weights_keys)
    group = ("first.model.embed_tokens.weight", "first.lm_head.weight")
    slots = {group[0]: (*group, *(name.replace("first", "second") for name in group))}
    plan = Plan({}, {}, slots, {}, {}, {}, frozenset())
    for keys in (None, dict(inside)):  # of its class, and of itself
        if keys is not None:
            model.first._tied_weights_keys = keys
        load = Loading(cast(CompressedCheckpoint, None), {})
        untie(model, load, plan)
        assert model.first._tied_weights_keys == {}
        retie(model, load)
        assert vars(model.first).get("_tied_weights_keys") == keys
        assert model.first._tied_weights_keys == inside
        assert model.all_tied_weights_keys == every
