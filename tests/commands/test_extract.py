"""extract: the adapter turns BASE into TUNED up to the error that is reported, and bytes go where they save most."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from spectral_surgery.adapters.from_update.fit_update import EXTRACTORS, Size
from spectral_surgery.cli import cli
from spectral_surgery.commands.extract import ExtractOptions, ExtractReport, extract
from spectral_surgery.commands.merge import merge
from spectral_surgery.errors import CheckpointError, ConfigError, TargetError
from spectral_surgery.files.index import read_index
from spectral_surgery.files.peft.adapter_files import TENSOR_FILE, read_adapter
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.targets import ModuleTargets
from tests.support.checkpoints import gaussian, llama_like, write_folder
from tests.support.tiny import outputs, tiny

Q, DOWN, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.0.input_layernorm"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FOURIER = ("fourierft", "fourierft_biased")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: read_tensor(info) for name, info in read_index(folder).tensors.items()}


def tuned_from(
    tensors: dict[str, Tensor], changed: tuple[str, ...] = (f"{Q}.weight", f"{DOWN}.weight")
) -> dict[str, Tensor]:
    """A fine-tune: low rank and some noise, in the dtype of the weights."""
    out = dict(tensors)
    for seed, name in enumerate(changed):
        rows, columns = tensors[name].shape if tensors[name].dim() == 2 else (len(tensors[name]), 1)
        low = gaussian(rows, 3, seed=seed) @ gaussian(3, columns, seed=50 + seed)
        delta = (low + 0.02 * gaussian(rows, columns, seed=90 + seed)).reshape(tensors[name].shape)
        out[name] = (tensors[name].float() + delta).to(tensors[name].dtype)
    return out


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = llama_like(torch.float32)
    write_folder(tmp_path / "base", base)
    write_folder(tmp_path / "tuned", tuned_from(base), shards=2)
    return tmp_path / "base", tmp_path / "tuned", tmp_path / "out"


def run(
    folders: tuple[Path, Path, Path], method: str = "lora", kind: Any = "count", value: float = 4, **more: Any
) -> ExtractReport:
    base, tuned, out = folders
    return extract(base, tuned, out, ExtractOptions(method, Size(kind, value), **more), overwrite=True)


@pytest.mark.parametrize("method", EXTRACTORS)
@pytest.mark.parametrize(("kind", "value"), [("bytes", 20000), ("count", 20), ("max_error", 0.8)])
def test_merging_gives_the_tuned_model_up_to_the_reported_error(
    folders: tuple[Path, Path, Path], tmp_path: Path, method: str, kind: str, value: float
) -> None:
    report = run(folders, method, kind, value)
    merge(folders[0], [folders[2]], tmp_path / "merged")
    base, tuned, merged = (tensors_of(folder) for folder in (folders[0], folders[1], tmp_path / "merged"))
    assert {layer.layer for layer in report.layers} == {Q, DOWN}
    assert report.rest == {}
    left = whole = 0.0
    for layer in report.layers:
        name = f"{layer.layer}.weight"
        difference = (tuned[name] - base[name]).double()
        error = float((merged[name] - tuned[name]).double().norm() / difference.norm())
        assert error == pytest.approx(layer.relative_error, rel=1e-3, abs=1e-5)
        assert layer.energy_kept == pytest.approx(1 - error**2, abs=1e-3)
        assert layer.relative_error >= layer.floor - 1e-6
        assert (layer.floor > 0.6) == (method in FOURIER)
        left += float((merged[name] - tuned[name]).double().square().sum())
        whole += float(difference.square().sum())
        if kind == "max_error":
            assert error <= value
        if kind == "count":
            assert layer.components == 20
    assert report.relative_error == pytest.approx((left / whole) ** 0.5, rel=1e-3)
    assert report.stored_bytes == (folders[2] / TENSOR_FILE).stat().st_size
    if kind == "bytes":
        assert 0.8 * value < report.stored_bytes <= value


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_narrow_numbers_cost_half_and_count_in_the_error(folders: tuple[Path, Path, Path], dtype: str) -> None:
    wide = run(folders, "lora", "count", 4)
    narrow = run(folders, "lora", "count", 4, dtype=dtype)
    assert all(2 * a.stored_bytes == b.stored_bytes for a, b in zip(narrow.layers, wide.layers, strict=True))
    assert wide.relative_error < narrow.relative_error < wide.relative_error + 0.01


@pytest.mark.parametrize("method", EXTRACTORS)
def test_the_rest_is_listed_or_saved_whole(tmp_path: Path, method: str) -> None:
    base = llama_like() | {f"{Q}.bias": gaussian(130, dtype=torch.bfloat16)}
    changed = (f"{Q}.weight", f"{DOWN}.weight", f"{Q}.bias", f"{NORM}.weight", EMBED)
    tuned = tuned_from(base, changed) | {"score.weight": gaussian(3, 96, dtype=torch.bfloat16)}
    tuned[HEAD] = tuned[EMBED].clone()
    folders = (write_folder(tmp_path / "base", base), write_folder(tmp_path / "tuned", tuned), tmp_path / "out")
    listed = run(folders, method, "count", 9)
    assert set(listed.rest) == {f"{Q}.bias", f"{NORM}.weight", EMBED, HEAD, "score.weight"}
    assert listed.rest["score.weight"] == "not in BASE"
    assert listed.rest[HEAD] == f"tied to {EMBED}"
    saved = run(folders, method, "bytes", 200000, save_rest=True)
    assert set(saved.rest.values()) == {"saved whole"}
    assert saved.stored_bytes <= 200000
    merge(folders[0], [folders[2]], tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    assert all(torch.equal(merged[name], tuned[name]) for name in saved.rest)


def test_what_no_file_of_an_adapter_can_hold(tmp_path: Path) -> None:
    base = {
        f"{Q}.weight": gaussian(8, 8),
        "vit.cls": gaussian(1, 8),
        "vit.norm.weight": gaussian(8),
        "steps": torch.arange(3),
    }
    base |= {
        "top": gaussian(3),
        "odd.weight": gaussian(5),
        "odd.count": torch.arange(5),
        f"{DOWN}.weight": gaussian(8, 9),
    }
    tuned = {name: tensor + 1 for name, tensor in base.items()} | {f"{DOWN}.weight": gaussian(8, 10)}
    folders = (write_folder(tmp_path / "base", base), write_folder(tmp_path / "tuned", tuned), tmp_path / "out")
    report = run(folders, save_rest=True, value=1)
    assert report.rest["vit.cls"] == "its module vit has others inside"
    assert report.rest["top"] == report.rest["steps"] == "belongs to no module"
    assert report.rest["odd.weight"] == "odd.count is I64"
    assert report.rest["vit.norm.weight"] == "saved whole"
    assert report.rest[f"{DOWN}.weight"] == "[8, 10], in BASE [8, 9]"
    assert [layer.layer for layer in report.layers] == [Q]


def test_embeddings(tmp_path: Path) -> None:
    base = llama_like(torch.float32) | {HEAD: gaussian(300, 96, seed=7)}  # not tied
    folders = (
        write_folder(tmp_path / "base", base),
        write_folder(tmp_path / "tuned", tuned_from(base, (EMBED, f"{Q}.weight"))),
        tmp_path / "out",
    )
    embed = EMBED.removesuffix(".weight")
    assert {layer.layer for layer in run(folders, "spectral_delta").layers} == {embed, Q}
    assert {layer.layer for layer in run(folders, "lora").layers} == {embed, Q}
    rest = run(folders, "fourierft").rest
    assert rest == {EMBED: "an embedding, for which files of fourierft have no form that PEFT reads"}
    asked = run(folders, "lora", targets=ModuleTargets(("embed_tokens",)))
    assert [layer.layer for layer in asked.layers] == [embed]
    assert asked.rest == {f"{Q}.weight": "not among the targets"}
    merge(folders[0], [folders[2]], tmp_path / "merged")


def test_tied_weights_named_as_targets_are_changed_together(tmp_path: Path) -> None:
    base = llama_like(torch.float32)
    tuned = tuned_from(base, (EMBED,))
    tuned[HEAD] = tuned[EMBED].clone()
    folders = (write_folder(tmp_path / "base", base), write_folder(tmp_path / "tuned", tuned), tmp_path / "out")
    report = run(folders, "lora", "count", 90, targets=ModuleTargets(("embed_tokens", "lm_head")))
    assert [layer.layer for layer in report.layers] == ["model.embed_tokens"]
    assert report.rest == {}
    assert report.to_json()["tied"] == {HEAD: EMBED}
    merge(folders[0], [folders[2]], tmp_path / "merged")
    torch.testing.assert_close(tensors_of(tmp_path / "merged")[HEAD], tuned[HEAD], rtol=1e-2, atol=1e-3)
    untied = tuned | {HEAD: gaussian(300, 96, seed=9)}
    write_folder(tmp_path / "untied", untied)
    with pytest.raises(ConfigError, match=r"difference: expected models that.*got zero in every layer"):
        run((folders[0], tmp_path / "untied", folders[2]), "lora")


def test_transposed_weights_and_convolutions(tmp_path: Path) -> None:
    base = {
        "h.0.attn.c_attn.weight": gaussian(12, 36),
        "h.0.other.weight": gaussian(12, 12),
        "wte.weight": gaussian(20, 12),
    }
    tuned = tuned_from(base, ("h.0.attn.c_attn.weight", "h.0.other.weight"))
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    folders = (
        write_folder(tmp_path / "base", base, config=config),
        write_folder(tmp_path / "tuned", tuned, config=config),
        tmp_path / "out",
    )
    report = run(folders, value=12)
    shapes = {layer.layer: layer.shape for layer in report.layers}
    assert shapes == {"h.0.attn.c_attn": (36, 12), "h.0.other": (12, 12)}
    assert read_adapter(folders[2]).spec.task_type == "CAUSAL_LM"
    merge(folders[0], [folders[2]], tmp_path / "merged")
    for name in ("h.0.attn.c_attn.weight", "h.0.other.weight"):
        torch.testing.assert_close(tensors_of(tmp_path / "merged")[name], tuned[name])
    conv = {"patch.weight": gaussian(6, 3, 4, 4)}
    write_folder(tmp_path / "conv", conv)
    write_folder(tmp_path / "conv2", {"patch.weight": conv["patch.weight"] + gaussian(6, 3, 4, 4, seed=1)})
    assert run((tmp_path / "conv", tmp_path / "conv2", folders[2]), value=6).relative_error < 1e-5


def test_layers_and_patterns_choose(folders: tuple[Path, Path, Path]) -> None:
    only = run(folders, targets=ModuleTargets(None, exclude_modules=("down_proj",)))
    assert [layer.layer for layer in only.layers] == [Q]
    assert only.rest == {f"{DOWN}.weight": "not among the targets"}
    assert {layer.layer for layer in run(folders, targets=ModuleTargets(None, layers_to_transform=(0,))).layers} == {
        Q,
        DOWN,
    }
    with pytest.raises(TargetError, match="matches none"):
        run(folders, targets=ModuleTargets(("nothing",)))


def test_peft_gives_the_outputs_of_the_merged_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, tuned = tiny("llama"), tiny("llama")
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith("q_proj.weight") or name.endswith("norm.weight"):
                parameter.add_(gaussian(*parameter.shape, seed=len(name)))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = run((tmp_path / "base", tmp_path / "tuned", tmp_path / "out"), value=32, save_rest=True)
    assert set(report.rest.values()) == {"saved whole"}
    with warnings.catch_warnings():  # of the libraries, not ours
        warnings.simplefilter("ignore")
        found = outputs("llama", peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "out").eval())
    torch.testing.assert_close(found, outputs("llama", tuned), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, outputs("llama", base), rtol=1e-2, atol=1e-2)


def test_bad_input_is_refused_and_nothing_written(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, out = folders
    other = write_folder(tmp_path / "other", {"x.weight": gaussian(4, 4)})
    marked = write_folder(tmp_path / "marked", llama_like(), config={"quantization_config": {}})
    broken = tensors_of(tuned)
    broken[f"{Q}.weight"][0, 0] = torch.nan
    nan = write_folder(tmp_path / "nan", broken)
    for sources, options, error, match in (
        ((base, other), {}, CheckpointError, "expected a model tuned from"),
        ((base, base), {}, ConfigError, "difference: expected models that.*got zero in every layer"),
        ((base, marked), {}, CheckpointError, "marked: expected a plain checkpoint, got one quantised already"),
        ((base, nan), {}, ConfigError, r"model\.layers\.0\.self_attn\.q_proj:.*got a difference that is not finite"),
        (
            (base, tuned),
            {"kind": "bytes", "value": 100},
            ConfigError,
            r"of which \d+ go to names and shapes .* got 100",
        ),
        ((base, tuned), {"kind": "bytes", "value": 1000}, ConfigError, "too few for a single component"),
        ((base, tuned), {"kind": "max_error", "value": 3}, ConfigError, "max_error: expected .*, got 3"),
        (
            (base, tuned),
            {"method": "fourierft", "kind": "max_error", "value": 0.5},
            ConfigError,
            r"0\.5: out of reach of fo",
        ),
        ((base, tuned), {"method": "vera"}, ConfigError, "method to extract to: expected one of .*, got 'vera'"),
    ):
        with pytest.raises(error, match=match):
            run((*sources, out), **options)
    for method, settings, match in (
        ("foura", {"transform": "dft"}, "got 'dft', whose factors do not reach"),
        ("foura", {"use_gate": True}, "use_gate: expected false, got true: a weight update is the same"),
        ("fourierft", {"scaling": "auto"}, "scaling: .* got auto: coefficients are divided by it"),
        ("spectral_delta", {"scaling": 0.0}, r"scaling: .* got 0\.0: coefficients are divided by it"),
    ):
        with pytest.raises(ConfigError, match=match):
            run(folders, method, config=EXTRACTORS[method].method.config(**settings))
    assert not out.exists()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["extract", *map(str, arguments)])


def test_command(folders: tuple[Path, Path, Path]) -> None:
    plan = invoke(*folders, "--method", "lora", "--rank", 2, "--dry-run", "--json")
    assert set(json.loads(plan.stdout)["layers"]) == {Q, DOWN}
    assert (
        "2 matrices would be compared. Nothing was written."
        in invoke(*folders, "--method", "lora", "--rank", 2, "--dry-run").stdout
    )
    assert not folders[2].exists()
    done = invoke(*folders, "--method", "fourierft", "--bytes", 9000, "-q")
    assert "least possible error" in done.stdout
    assert "fourierft: relative error" in done.stdout
    more = invoke(
        *folders,
        "--method",
        "foura",
        "--rank",
        2,
        "-o",
        "transform=hartley",
        "--dtype",
        "bfloat16",
        "--overwrite",
        "--json",
        "-q",
    )
    body = json.loads(more.stdout)
    assert body["unit"] == "rank"
    assert {layer["components"] for layer in body["layers"]} == {2}
    assert read_adapter(folders[2]).spec.config.transform == "hartley"
    only = invoke(*folders, "--method", "lora", "--rank", 2, "--target-modules", "q_proj", "--overwrite", "-q")
    assert f"{DOWN}.weight: differs, not covered: not among the targets" in only.stdout
    assert "--save-rest stores those it can" in only.stdout


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "expected one of --bytes, --max-error, --rank and --n-frequency, got none"),
        (("--rank", 1, "--bytes", 9), "expected one of --bytes, --rank, got all"),
        (("--n-frequency", 4), "expected --rank for lora, got --n-frequency"),
        (("--rank", 1, "--layers", "a"), "expected numbers such as 0,1,8-11, got 'a'"),
    ],
)
def test_wrong_usage(folders: tuple[Path, Path, Path], arguments: tuple[object, ...], match: str) -> None:
    result = invoke(*folders, "--method", "lora", *arguments)
    assert result.exit_code == 2
    assert match in result.output


@pytest.mark.parametrize("method", ["lora", "fourierft"])
def test_peft_has_a_changed_tied_embedding_in_both_its_places(tmp_path: Path, method: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)).eval()

    base, tuned = fresh(), fresh()
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
            tuned.get_parameter(name).add_(gaussian(*tuned.get_parameter(name).shape, seed=len(name)))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    folders = (tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    unit = {"kind": "count", "value": 32 if method == "lora" else 1024}
    listed = run(folders, method, **unit)
    assert listed.rest == {EMBED: "tied to the output layer, which an adapter would not reach in a live model"}
    report = run(folders, method, save_rest=True, **unit)
    assert report.rest == {EMBED: "saved whole"}
    with warnings.catch_warnings():  # of the libraries, not ours
        warnings.simplefilter("ignore")
        live = peft.PeftModel.from_pretrained(fresh(), tmp_path / "out").eval()
    merge(folders[0], [folders[2]], tmp_path / "merged")
    wanted = {
        "lora": outputs("llama", tuned),
        "fourierft": outputs("llama", LlamaForCausalLM.from_pretrained(tmp_path / "merged")),
    }
    torch.testing.assert_close(outputs("llama", live), wanted[method], rtol=1e-4, atol=1e-4)
