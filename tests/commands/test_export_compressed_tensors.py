"""export to compressed-tensors: transformers computes what the report promises, and vLLM's arithmetic our codes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectral_surgery import load_compressed
from spectral_surgery.baselines import BASELINES
from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.export import export_model
from spectral_surgery.commands.export.compressed_tensors import IntegerSettings
from spectral_surgery.commands.export.integer_groups import in_groups_of, packed
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from tests.support.checkpoints import gaussian
from tests.support.compressed import compressed_folder, dense_model, output

compressed_tensors = pytest.importorskip("compressed_tensors", reason="not run: compressed-tensors is not installed")

TILED = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def loaded(folder: Path) -> Any:
    """A model of transformers as anybody loads it."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tiled_model(folder: Path, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A model whose sides are multiples of 64."""
    import transformers

    config = transformers.LlamaConfig(
        **TILED, num_key_value_heads=4, head_dim=16, pad_token_id=0, attention_bias=bias, tie_word_embeddings=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def tiled_folder(folder: Path, *, transform: str = "dct", quantizer: Any = None, **given: Any) -> Path:
    source = tiled_model(folder / "source", **given)
    options = CompressOptions(Target("bits", 4.0), transform=transform, quantizer=quantizer, min_weights=1000)
    compress(source, folder / "compressed", options)
    return folder / "compressed"


class Transform(nn.Module):
    """What vLLM's module does with a stored matrix: x @ M / sqrt(side), by blocks of side numbers."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix / math.sqrt(len(matrix))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, len(self.matrix))) @ self.matrix).flatten(-2)


class ServedLinear(nn.Module):
    """A linear layer of vLLM: transform of the input, integers times a scale for each row, transform of the output."""

    def __init__(self, stored: dict[str, Tensor]) -> None:
        super().__init__()
        shape = [int(size) for size in stored["weight_shape"]]
        unpack = compressed_tensors.compressors.pack_quantized.helpers.unpack_from_int32
        self.weight = unpack(stored["weight_packed"], 8, torch.Size(shape)).float() * stored["weight_scale"]
        self.before, self.after = (
            Transform(stored[f"{name}.weight"]) for name in ("spectral_analysis_input", "spectral_synthesis_output")
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.before(x) @ self.weight.T)
        return y


def served(folder: Path) -> Any:
    """The model of a folder as vLLM runs it, from its files and configuration alone."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    quantized = config.pop("quantization_config")
    assert quantized["format"] == "pack-quantized"
    assert quantized["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    for place, scheme in zip(("input", "output"), quantized["transform_config"]["config_groups"].values(), strict=True):
        assert scheme["type"] == "random-matrix"
        assert scheme["apply"] == [{"targets": ["Linear"], "location": place, "inverse": False, "ignore": ["lm_head"]}]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.float32
    ).eval()
    tensors = load_file(folder / "model.safetensors")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in quantized["ignore"]:
            own = {
                key.removeprefix(f"{name}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")
            }
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, ServedLinear(own))
    left = model.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=False)
    assert not left.unexpected_keys
    return model


@pytest.mark.parametrize("transform", ["dct", "hadamard", "hartley"])
def test_codes_in_vllms_arithmetic_are_the_compressed_model(tmp_path: Path, transform: str) -> None:
    folder = tiled_folder(tmp_path, transform=transform)
    report = export_model(folder, tmp_path / "out", "compressed-tensors-exact")
    assert report.export_error < 1e-6
    assert len(report.tensors) == 14
    expected = output(load_compressed(folder, dtype=torch.float32))
    assert float((output(served(tmp_path / "out")) - expected).abs().max()) <= 1e-5
    assert any("experimental" in note for note in report.notes)


def test_codes_of_the_scalar_quantiser_too(tmp_path: Path) -> None:
    folder = tiled_folder(tmp_path, quantizer="scalar")
    export_model(folder, tmp_path / "out", "compressed-tensors-exact")
    expected = output(load_compressed(folder, dtype=torch.float32))
    assert float((output(served(tmp_path / "out")) - expected).abs().max()) <= 1e-5


def test_what_is_stored_is_what_the_library_reads(tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.transform import TransformConfig

    export_model(tiled_folder(tmp_path), tmp_path / "out", "compressed-tensors-exact")
    quantized = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    transforms = TransformConfig.model_validate(quantized.pop("transform_config"))
    assert {scheme.head_dim for scheme in transforms.config_groups.values()} == {64}
    assert QuantizationConfig.model_validate(quantized).quantization_status == "compressed"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda folder: tiled_folder(folder, bias=True), r"q_proj\.weight: has a bias, which vLLM does not add"),
        (lambda folder: compressed_folder("llama", folder), r"k_proj\.weight: is 32 x 64, which tiles of 64 do not"),
        (lambda folder: tiled_model(folder / "plain"), "plain: is not compressed, so that there are no codes"),
    ],
)
def test_what_vllm_cannot_multiply_is_named(tmp_path: Path, build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_model(build(tmp_path), tmp_path / "out", "compressed-tensors-exact")
    assert not (tmp_path / "out").exists()


def test_codes_beyond_int8_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    source = tiled_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e3
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    compress(source, tmp_path / "compressed", CompressOptions(Target("max_error", 0.001), min_weights=1000))
    with pytest.raises(ConfigError, match=r"weight: codes reach -?\d+ to \d+; expected levels from -127 to 127"):
        export_model(tmp_path / "compressed", tmp_path / "out", "compressed-tensors-exact")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_computes_what_was_promised(tmp_path: Path, bits: Any) -> None:
    folder = tiled_folder(tmp_path)
    report = export_model(
        folder, tmp_path / "out", "compressed-tensors", IntegerSettings(bits), original=tmp_path / "source"
    )
    decompress(folder, tmp_path / "decoded")
    decoded, plain = loaded(tmp_path / "decoded"), loaded(tmp_path / "out")
    output(plain)  # which decodes its weights
    served_weights, weights = plain.state_dict(), decoded.state_dict()
    source = load_file(tmp_path / "source" / "model.safetensors")
    for tensor in report.tensors:
        there = served_weights[tensor.name].float()
        assert error(there, weights[tensor.name]) == pytest.approx(tensor.export_error, rel=1e-3)
        assert error(there, source[tensor.name]) == pytest.approx(tensor.total_error, rel=1e-3)
        assert tensor.compressed_error == pytest.approx(error(weights[tensor.name], source[tensor.name]), rel=1e-3)
    kept = [name for name in report.kept if "layernorm" in name or "embed" in name]
    assert kept
    assert all(torch.equal(served_weights[name], weights[name]) for name in kept)
    assert error(output(plain), output(decoded)) < {4: 0.2, 8: 0.02}[bits]


def test_four_bits_lose_less_than_nf4() -> None:
    weight = gaussian(256, 512)
    ours = error(in_groups_of(weight, 4, 32, torch.bfloat16).dense(), weight)
    assert ours <= error(BASELINES["nf4"].method(weight).weight, weight)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 1024)])
def test_no_other_scale_of_a_group_loses_less(bits: int, group: int) -> None:
    rows = (gaussian(8, group), gaussian(1, group) ** 3, torch.zeros(1, group), torch.full((1, group), 1e-38))
    weight = torch.cat(rows)
    found = in_groups_of(weight, bits, group, torch.float32)
    least = (found.dense() - weight).square().sum(1)
    most = 2 ** (bits - 1)
    for factor in torch.linspace(0.3, 1.2, 400):
        scale = (weight.abs().amax(1, keepdim=True) / (most - 0.5) * factor).clamp_min(1e-45)
        tried = ((weight / scale).round().clamp(-most, most - 1) * scale - weight).square().sum(1)
        assert bool((least <= tried * 1.03 + 1e-30).all())


def test_integers_are_packed_as_the_library_packs_them() -> None:
    pack = compressed_tensors.compressors.pack_quantized.helpers.pack_to_int32
    for bits in (4, 8):
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 37), generator=torch.Generator().manual_seed(0))
        assert torch.equal(packed(codes.to(torch.int8), bits), pack(codes.to(torch.int8), bits))


@pytest.mark.parametrize("family", ["llama_tied", "bert", "qwen3_moe"])
def test_models_of_other_kinds(tmp_path: Path, family: str) -> None:
    """Tied heads keep their values, experts do not; a plain checkpoint will do."""
    import transformers

    model = dense_model(family)
    model.save_pretrained(tmp_path / "source")
    report = export_model(tmp_path / "source", tmp_path / "out", "compressed-tensors", IntegerSettings(8))
    assert not any("embed" in tensor.name for tensor in report.tensors)
    assert sum(".experts." in tensor.name for tensor in report.tensors) == (24 if family == "qwen3_moe" else 0)
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert error(output(again), output(model)) < 0.03


def test_a_model_that_is_initialised_by_its_weights_is_decoded_when_it_is_loaded(tmp_path: Path) -> None:
    import transformers

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 96}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "source")
    report = export_model(tmp_path / "source", tmp_path / "out", "compressed-tensors", IntegerSettings(8))
    assert any("decodes them as it loads them" in note for note in report.notes)
    again, info = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        outputs = [part(input_ids=ids, decoder_input_ids=ids).logits for part in (again.eval(), model)]
    assert 0 < error(*outputs) < 0.03
    assert again.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.float32


def test_layers_that_are_more_than_linear_keep_their_weights(tmp_path: Path) -> None:
    """A pooling head's attention has a projection of a class of its own, which the library takes for a linear layer."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**sizes, image_size=32, patch_size=8)
        ).eval()
    model.save_pretrained(tmp_path / "source")
    export_model(tmp_path / "source", tmp_path / "out", "compressed-tensors", IntegerSettings(8))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert any(name.endswith("head.attention.out_proj") for name in config["ignore"])
    again, info = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = gaussian(1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        outputs = [part(pixel_values=pixels).pooler_output for part in (again.eval(), model)]
    assert 0 < error(*outputs) < 0.03


def test_experts_that_transformers_would_replace_are_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.Llama4TextConfig(
        **TILED, head_dim=16, intermediate_size_mlp=128, num_key_value_heads=4, num_local_experts=2, pad_token_id=0
    )
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ConfigError, match=r"\.experts: is a Llama4TextExperts, which transformers replaces"):
        export_model(tmp_path / "source", tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.glob("out*"))


def test_groups_that_do_not_divide_are_named(tmp_path: Path) -> None:
    folder = compressed_folder("llama", tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"down_proj\.weight: has 72 columns, which groups of 32 do not divide; .* Use -o group_size=8\.$",
    ):
        export_model(folder, tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()
    assert export_model(folder, tmp_path / "out", "compressed-tensors", IntegerSettings(group_size=8)).tensors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (IntegerSettings(group_size=0), r"^group_size 0: expected a number of columns, 1 or more\."),
        (IntegerSettings(group_size=-8), r"^group_size -8: expected a number of columns, 1 or more\."),
        (IntegerSettings(3), r"^bits 3: expected 4 or 8\."),  # type: ignore[arg-type]
    ],
)
def test_settings_that_nobody_reads_are_refused(tmp_path: Path, settings: IntegerSettings, message: str) -> None:
    folder = compressed_folder("llama", tmp_path)
    with pytest.raises(ConfigError, match=message):
        export_model(folder, tmp_path / "out", "compressed-tensors", settings)
    assert not list(tmp_path.glob("out*"))


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    folder = compressed_folder("gpt2", tmp_path)
    with pytest.raises(ConfigError, match="compressed: has no linear layer of its own to make integers of"):
        export_model(folder, tmp_path / "out", "compressed-tensors")


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    source = tiled_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: has NaN or infinite values"):
        export_model(source, tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.glob("out*"))


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["export", *map(str, arguments)])


def test_the_command(tmp_path: Path) -> None:
    folder = tiled_folder(tmp_path, dtype=torch.bfloat16)
    plan = invoke(folder, tmp_path / "out", "--to", "compressed-tensors", "--dry-run")
    assert "14 tensors as int4, groups of 32" in plan.stdout
    assert not (tmp_path / "out").exists()
    done = invoke(folder, tmp_path / "out", "--to", "compressed-tensors", "--base", tmp_path / "source", "-q", "--json")
    body = json.loads(done.stdout)
    assert body["total_error"] ** 2 == pytest.approx(body["export_error"] ** 2 + 0.066**2, rel=0.1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "spectral-surgery export SOURCE OUT --to compressed-tensors" in card
    assert invoke(folder, tmp_path / "b", "--to", "compressed-tensors", "--rank", 3).exit_code == 2
    assert isinstance(invoke(folder, tmp_path / "b", "--to", "compressed-tensor").exception, ConfigError)
