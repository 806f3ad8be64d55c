"""Compressed folders in vLLM, by stand-ins for it: every weight where vLLM would put it, and the decoded numbers."""

from __future__ import annotations

import pickle
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.errors import CheckpointError, ConfigError, FormatVersionError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.quantizer.lazy_weight import LazyWeight, Rows
from spectral_surgery.hf.vllm import register
from spectral_surgery.hf.vllm.layers import Packed
from spectral_surgery.hf.vllm.loader import stored_weights
from spectral_surgery.layers import SpectralWeight
from tests.support.compressed import compressed_folder
from tests.support.vllm_stand_ins import LinearBase, LoadConfig, Plain, Source, Vllm, VocabParallelEmbedding, vllm

__all__ = ["vllm"]

COLUMNS = 48


def lazy(rows: int, seed: int = 0) -> LazyWeight:
    weight = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return LazyWeight.of(Rows.all(SpectralWeight.from_spectra(encode(weight, Target("bits", 6))[0])))


def settings(vllm: Vllm) -> Any:
    register()
    return vllm.configs["spectral_surgery"].from_config({"quant_method": "spectral_surgery", "format_version": 2})


def loaded(layer: Any, *weights: tuple[Tensor, Any]) -> Any:
    for weight, shard in weights:
        layer.weight.weight_loader(layer.weight, weight, shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() <= 4e-6 * expected.norm())


def test_the_entry_point_of_the_package_is_register() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, _, function = project["project"]["entry-points"]["vllm.general_plugins"]["spectral_surgery"].partition(":")
    assert getattr(import_module(module), function) is register


def test_registers_twice_and_what_it_registers_is_pickled_by_name(vllm: Vllm) -> None:
    made = settings(vllm)
    first = dict(vllm.configs), dict(vllm.loaders)
    register()
    assert (vllm.configs, vllm.loaders) == first
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is vllm.configs["spectral_surgery"]
    assert again.get_name() == "spectral_surgery"
    assert torch.bfloat16 in again.get_supported_act_dtypes()


def test_another_format_version_is_refused(vllm: Vllm) -> None:
    register()
    with pytest.raises(FormatVersionError, match="version"):
        vllm.configs["spectral_surgery"].from_config({"format_version": 99})


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 96)])
@pytest.mark.parametrize("tokens", [1, 40])
def test_packed_matrices_stay_apart_in_whatever_order_they_come(vllm: Vllm, tokens: int, bias: Tensor | None) -> None:
    q, k, v = lazy(40), lazy(32, 1), lazy(24, 2)
    layer = loaded(LinearBase(settings(vllm), COLUMNS, [40, 32, 24], "qkv"), (v, "v"), (q, "q"), (k, "k"))
    x = torch.randn(tokens, COLUMNS)
    expected = functional.linear(x, torch.cat([part.data for part in (q, k, v)]), bias)
    assert close(layer.quant_method.apply(layer, x, bias), expected)
    assert len(layer.packed.weights) == 3
    assert sum(part.numel() for part in layer.parameters()) == 0


def test_numbered_parts_and_a_part_that_is_not_compressed(vllm: Vllm) -> None:
    gate, up = lazy(40), torch.randn(40, COLUMNS)
    layer = loaded(LinearBase(settings(vllm), COLUMNS, [40, 40], "gate_up"), (up, 1), (gate, 0))
    x = torch.randn(5, COLUMNS)
    assert close(layer.quant_method.apply(layer, x), x @ torch.cat([gate.data, up]).T)


def test_parts_that_are_stored_together_cut_or_turned(vllm: Vllm) -> None:
    whole, x = lazy(96), torch.randn(3, COLUMNS)
    layer = loaded(LinearBase(settings(vllm), COLUMNS, [40, 56], "packed"), (whole, None))
    assert close(layer.quant_method.apply(layer, x), x @ whole.data.T)
    cut = loaded(LinearBase(settings(vllm), COLUMNS, [40, 56], "cut"), (whole[:40], 0), (whole[40:], (1,)))
    assert close(cut.quant_method.apply(cut, x), x @ whole.data.T)
    turned = loaded(LinearBase(settings(vllm), 96, [COLUMNS], "conv1d"), (whole.t(), None))
    x = torch.randn(3, 96)
    assert close(turned.quant_method.apply(turned, x), x @ whole.data)


def test_embeddings_of_a_padded_vocabulary_and_a_head_tied_to_them(vllm: Vllm) -> None:
    weight, config = lazy(70), settings(vllm)
    table = VocabParallelEmbedding(config, 70, COLUMNS, "")
    head = VocabParallelEmbedding(config, 70, COLUMNS, "lm_head")
    assert head.quant_method.tie_weights(head, table) is head
    assert head.weight is table.weight
    loaded(table, (weight, None))
    head.quant_method.process_weights_after_loading(head)
    ids, x = torch.tensor([[0, 69, 3]]), torch.randn(2, COLUMNS)
    assert close(table.quant_method.embedding(table, ids), weight.data[ids])
    assert close(head.quant_method.apply(head, x), x @ weight.data.T)
    assert head.packed.weights[0] is table.packed.weights[0]


def test_what_is_not_compressed_is_left_to_vllm(vllm: Vllm) -> None:
    weight, config = torch.randn(40, COLUMNS), settings(vllm)
    layer = loaded(LinearBase(config, COLUMNS, [40], "o"), (weight, None))
    assert isinstance(layer.quant_method, Plain)
    assert torch.equal(layer.weight, weight)
    assert config.get_quant_method(nn.LayerNorm(4), "norm") is None
    table = VocabParallelEmbedding(config, 40, COLUMNS, "embed_tokens")
    head = VocabParallelEmbedding(config, 40, COLUMNS, "lm_head")
    head.quant_method.tie_weights(head, table)
    loaded(table, (weight, None))
    head.quant_method.process_weights_after_loading(head)
    assert head.weight is table.weight
    assert torch.equal(head.quant_method.apply(head, weight[:2]), weight[:2] @ weight.T)


def test_faults_are_one_line_with_the_layer(vllm: Vllm) -> None:
    config = settings(vllm)
    with pytest.raises(ConfigError, match=r"^model\.qkv: .*tensor-parallel-size 1\.$"):
        LinearBase(config, COLUMNS, [40, 40], "model.qkv", cut=2)
    with pytest.raises(CheckpointError, match=r"^model\.o: expected a weight of 40 rows, got 0"):
        loaded(LinearBase(config, COLUMNS, [40], "model.o"))
    with pytest.raises(CheckpointError, match=r"^model\.qkv: expected a weight of 80 rows, got 40"):
        loaded(LinearBase(config, COLUMNS, [40, 40], "model.qkv"), (lazy(40), "q"))
    vllm.load_config = LoadConfig("auto")
    with pytest.raises(ConfigError, match="--load-format spectral_surgery"):
        LinearBase(config, COLUMNS, [40], "model.o")


def test_a_packed_layer_moves_its_spectra_and_compiles() -> None:
    parts = [lazy(40).source, lazy(24, 1).source]
    packed, x = Packed([part for part in parts if isinstance(part, Rows)]), torch.randn(3, COLUMNS)
    assert {name.rsplit(".", 1)[-1] for name, _ in packed.named_buffers()} >= {"codes", "scale"}
    compiled = torch.compile(packed, fullgraph=True, backend="eager", dynamic=True)
    assert close(compiled(x), packed(x))
    assert close(compiled(x[:1]), packed(x[:1]))


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "vit", "qwen3_moe"])
def test_gives_every_stored_tensor_as_it_decodes(tmp_path: Path, family: str) -> None:
    folder = compressed_folder(family, tmp_path)
    checkpoint = open_compressed(folder)
    decompress(folder, tmp_path / "plain")
    expected = {name: read_tensor(info) for name, info in read_index(tmp_path / "plain").tensors.items()}
    given = dict(stored_weights(checkpoint, "auto", torch.float32))
    assert given.keys() == expected.keys() | checkpoint.manifest.aliases.keys()
    for name, tensor in given.items():
        same = expected[checkpoint.manifest.aliases.get(name, name)]
        assert torch.equal(torch.empty_like(same).copy_(tensor), same)
    records = checkpoint.manifest.tensors
    matrices = {name for name, record in records.items() if record.shape == record.matrix}
    assert {name for name in records if isinstance(given[name], LazyWeight)} == matrices


def test_gives_what_is_coded_without_loss(tmp_path: Path) -> None:
    weight = torch.randn(64, 128).bfloat16()
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    compress(tmp_path / "model.safetensors", tmp_path / "out", CompressOptions(Target("lossless", 0.0)))
    ((name, tensor),) = stored_weights(open_compressed(tmp_path / "out"), "auto", torch.float32)
    assert name == "a.weight"
    assert torch.equal(tensor, weight)


def test_the_loader_reads_compressed_folders_and_leaves_others_to_vllm(vllm: Vllm, tmp_path: Path) -> None:
    register()
    folder = compressed_folder("llama", tmp_path)
    loader = vllm.loaders["spectral_surgery"](LoadConfig(model_loader_extra_config={"resident": "coded"}))
    given = dict(loader._get_weights_iterator(Source(str(folder), prefix="a.")))
    weight = given["a.model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(weight, LazyWeight)
    assert isinstance(weight.source, Rows)
    assert weight.source.weight.resident == "coded"
    plain = loader._get_weights_iterator(Source(str(tmp_path / "source"), prefix="b."))
    assert [name for name, _ in plain] == ["b.read.by.vllm"]
    wrong = vllm.loaders["spectral_surgery"](LoadConfig(model_loader_extra_config={"resident": "int7"}))
    with pytest.raises(ConfigError, match="int7"):
        next(iter(wrong._get_weights_iterator(Source(str(folder)))))
