"""Fused experts of transformers run from the codes of the experts that are hit, and give what the dense ones give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import spectral_surgery
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.hf.quantizer.fill_weights import Loading
from spectral_surgery.hf.quantizer.saving import spectral_experts
from spectral_surgery.layers import SpectralExperts, SpectralWeight
from spectral_surgery.matmul import workers
from tests.support.compressed import EXPERTS, FAMILIES, LLAMA, compressed_folder, output
from tests.support.largest import largest_tensor

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
GPT_OSS = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}
KINDS = {
    "by expert": ("qwen3_moe", LLAMA | EXPERTS),
    "fused": ("qwen3_moe", LLAMA | EXPERTS),
    "fused, transposed, with biases": ("gpt_oss", GPT_OSS),
    "renamed": ("mixtral", LLAMA | {"num_local_experts": 4}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compressed folders, with the decompressed one beside each."""
    made = {}
    for kind, (family, settings) in KINDS.items():
        folder = tmp_path_factory.mktemp("experts")
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **settings))
        for name, parameter in model.named_parameters():
            if "bias" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / "source")
        if kind == "fused":  # as the model computes with them
            save_file(dict(model.state_dict()), folder / "source/model.safetensors", {"format": "pt"})
        compress(folder / "source", folder / "ours", CompressOptions(Target("bits", 2.5), min_weights=1000))
        decompress(folder / "ours", folder / "plain")
        made[kind] = folder / "ours"
    return made


def relative(expected: Tensor, actual: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "plain").eval()


@pytest.mark.parametrize("resident", ["int8", "int4", "coded"])
@pytest.mark.parametrize("kind", KINDS)
def test_gives_the_output_of_the_decompressed_model(folders: dict[str, Path], kind: str, resident: str) -> None:
    dense = plain(folders[kind])
    model = spectral_surgery.load_compressed(folders[kind], resident)
    assert relative(output(dense), output(model)) < 1e-5
    held = spectral_experts(model)
    assert len(held) == 4
    assert {weight.resident for own in held.values() for weight in own.weights} == {resident}
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, p in dense.named_parameters() if p.ndim == 3} == held.keys()
    assert not names & held.keys()


@pytest.mark.parametrize("resident", ["int8", "coded"])
def test_no_floating_matrix_is_ever_allocated(
    folders: dict[str, Path], resident: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither all experts nor one: one of them has 144 x 64 weights, and 4 tokens have fewer activations."""
    monkeypatch.setattr(Loading, "begin", lambda *_: None)  # other threads are not watched
    monkeypatch.setattr(workers.torch, "get_num_threads", lambda: 1)
    with largest_tensor(floating=True) as most:
        model = spectral_surgery.load_compressed(folders["fused"], resident)
    ids = torch.tensor([[3, 4, 5, 6]])
    one = 144 * 64
    assert most.numel < one
    with largest_tensor(floating=True) as most, torch.no_grad():
        model(ids)
    assert 0 < most.numel < one
    with largest_tensor(floating=True) as most, torch.no_grad():
        model.dequantize()(ids)
    assert most.numel >= 4 * one  # it does see them


def test_only_experts_that_are_hit_are_multiplied(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = spectral_surgery.load_compressed(folders["by expert"], "coded")
    experts = model.model.layers[0].mlp.experts
    used: list[SpectralWeight] = []
    matmul = SpectralWeight.matmul
    monkeypatch.setattr(SpectralWeight, "matmul", lambda self, x: used.append(self) or matmul(self, x))
    hidden, weights = torch.randn(3, 64), torch.ones(3, 2)
    out = experts(hidden, torch.tensor([[1, 3], [3, 1], [1, 4]]), weights)  # 4: of another process
    assert used == [experts.gate_up_proj.experts[n] for n in (1, 3)] + [experts.down_proj.experts[n] for n in (1, 3)]
    alone = experts(hidden[2:], torch.tensor([[1]]), weights[:1, :1])
    torch.testing.assert_close(out[2:], alone)
    assert experts(hidden[:1], torch.tensor([[4, 4]]), weights[:1]).eq(0).all()


def test_gradients_reach_the_hidden_states(folders: dict[str, Path]) -> None:
    grads = []
    for model in (plain(folders["by expert"]), spectral_surgery.load_compressed(folders["by expert"])):
        embedded = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        assert embedded.grad is not None
        grads.append(embedded.grad)
    assert relative(*grads) < 1e-4


def test_generates_the_same_tokens(folders: dict[str, Path]) -> None:
    ids = torch.arange(3, 11)[None]
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    for kind in KINDS:
        ours = spectral_surgery.load_compressed(folders[kind])
        assert ours.generate(ids, **settings).tolist() == plain(folders[kind]).generate(ids, **settings).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_saves_and_decodes_what_it_loaded(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    model = spectral_surgery.load_compressed(folders[kind])
    before = output(model)
    model.save_pretrained(tmp_path / "again")
    assert decompress(tmp_path / "again", tmp_path / "plain", verify=True).failures == ()
    again = spectral_surgery.open_compressed(tmp_path / "again").manifest.tensors
    assert again.keys() == spectral_surgery.open_compressed(folders[kind]).manifest.tensors.keys()
    assert torch.equal(before, output(spectral_surgery.load_compressed(tmp_path / "again")))
    own = type(model.model.layers[0].mlp.experts)
    model.dequantize()
    assert not spectral_experts(model)
    assert type(model.model.layers[0].mlp.experts) is own.__bases__[1]
    assert relative(before, output(model)) < 1e-5


def test_device_map_and_memory(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder = folders["by expert"]
    expected = output(spectral_surgery.load_compressed(folder))
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, device_map=places, offload_folder=str(tmp_path)).eval()
    assert torch.equal(expected, output(model))
    assert torch.equal(
        expected, output(auto.from_pretrained(folder, device_map="auto", max_memory={"cpu": 10**7}).eval())
    )


def test_what_is_not_all_compressed_is_decoded(tmp_path: Path) -> None:
    folder = compressed_folder("qwen3_moe", tmp_path)
    options = CompressOptions(
        Target("bits", 4), min_weights=1000, exclude=("*experts.1.up_proj*", "*layers.1.*down_proj*")
    )
    compress(tmp_path / "source", tmp_path / "mixed", options)
    decompress(tmp_path / "mixed", tmp_path / "plain")
    model = getattr(transformers, FAMILIES["qwen3_moe"][1]).from_pretrained(tmp_path / "mixed").eval()
    assert list(spectral_experts(model)) == ["model.layers.0.mlp.experts.down_proj"]
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, SpectralExperts)
    assert relative(output(plain(folder)), output(model)) < 1e-5


def test_dequantized_in_16_bits_it_has_the_weights_of_the_decompressed_folder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    decompress(folders["by expert"], tmp_path / "plain", dtype="bfloat16")
    load = transformers.AutoModelForCausalLM.from_pretrained
    expected = dict(load(tmp_path / "plain", dtype=torch.bfloat16).named_parameters())
    model = load(folders["by expert"], dtype=torch.bfloat16)
    model.dequantize(torch.bfloat16)
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert relative(parameter.float(), found[name].float()) < 5e-4, name  # a step rounded to 16 bits gives 3e-3
