"""Experts are calibrated one by one, on the tokens that go to each, and what was not reached is said."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from tests.support.command import run
from tests.support.tiny import save_tokenizer

pytest.importorskip("transformers")

import transformers

from spectral_surgery.calibration import layer_moments as moments_module
from spectral_surgery.calibration.expert_moments import ExpertMatrix, expert_moments
from spectral_surgery.hf.quantizer.fused_experts import expert_matrices, fused_matrices
from spectral_surgery.text.settings import TextData
from tests.zoo.entries import ZOO

SIZES: dict[str, Any] = {
    "vocab_size": 12, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 32,
}  # fmt: skip
KINDS = {
    "by expert": ("qwen3_moe", {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}, 18),
    "fused": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}, 9),
}
OPTIONS = CompressOptions(Target("bits", 2.0), min_weights=1000)


def model_of(kind: str) -> Any:
    family, own, _ = KINDS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **SIZES, **own))
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module", params=list(KINDS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / request.param
    model_of(request.param).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_definition(kind: str) -> None:
    experts = next(module for module in model_of(kind).modules() if fused_matrices(module))
    assert fused_matrices(experts) == ("gate_up_proj", "down_proj")
    matrices = {f"{leaf}{i}": ExpertMatrix(experts, leaf, i) for leaf in fused_matrices(experts) for i in (0, 2, 3)}
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[0, 2], [0, 1], [2, 1], [0, 2], [2, 1], [1, 0], [0, 1], [2, 0], [1, 2]])
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(1))
    before, expected = type(experts), experts(x, chosen, weights)
    with expert_moments(matrices) as found:
        torch.testing.assert_close(experts(x, chosen, weights), expected)
        experts(x, chosen, weights)
    assert type(experts) is before
    assert set(found) == {"gate_up_proj0", "down_proj0", "gate_up_proj2", "down_proj2"}  # none went to expert 3
    for expert in (0, 2):
        rows = x[(chosen == expert).any(-1)]
        torch.testing.assert_close(found[f"gate_up_proj{expert}"], 2 * rows.T @ rows)
        inner = _inner(experts, rows, expert)
        torch.testing.assert_close(found[f"down_proj{expert}"], 2 * inner.T @ inner, rtol=1e-4, atol=1e-4)


class Watching(TorchFunctionMode):
    """Keeps what is multiplied by the matrices of a module's experts, by parameter and expert."""

    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.places = {
            own.untyped_storage().data_ptr(): (name, own[0].numel()) for name, own in experts.named_parameters()
        }
        self.given: dict[tuple[str, int], list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.functional.linear, torch.bmm):
            x, weight = args[:2]
            name, size = self.places[weight.untyped_storage().data_ptr()]
            rows = list(x) if func is torch.bmm else [x]
            for expert, own in enumerate(rows, weight.storage_offset() // size):
                self.given.setdefault((name, expert), []).append(own.reshape(-1, own.shape[-1]))
        return func(*args, **(kwargs or {}))


ROUTED = {
    "jetmoe": ("JetMoeParallelExperts", (3, 64, 32)),
    "llama4": ("Llama4TextExperts", {"num_local_experts": 3, "intermediate_size": 32}),
    "inkling": ("InklingSharedExperts", {"n_shared_experts": 3, "moe_intermediate_size": 32}),
    "longcat_flash": (
        "LongcatFlashExperts", {"expert_ffn_hidden_size": 32, "n_routed_experts": 3, "zero_expert_num": 1}
    ),
    "step3p7": ("Step3p7Experts", {"num_local_experts": 3, "moe_intermediate_size": 32}),
}  # fmt: skip


@pytest.mark.parametrize("family", ROUTED)
def test_moments_of_experts_with_a_forward_of_their_own(family: str) -> None:
    name, sizes = ROUTED[family]
    kind = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)
    config = SimpleNamespace(hidden_size=64, hidden_act="silu", **sizes) if isinstance(sizes, dict) else None
    experts = kind(config) if config else kind(*sizes)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3)
    x = torch.randn(9, 64)
    chosen = torch.tensor([[0, 2], [0, 3], [2, 0], [0, 2], [2, 0], [3, 0], [0, 2], [2, 0], [3, 2]])  # 1 has no token
    given: tuple[Any, ...] = (x, chosen, torch.rand(9, 2))
    if family == "jetmoe":
        given = (x, [4, 0, 5])
    elif family == "llama4":  # the tokens that do not go to an expert are zeros
        given = (torch.stack([x * (chosen == expert).any(1, keepdim=True) for expert in range(3)]),)
    elif family == "inkling":
        given = (x, torch.rand(9, 3))
    before = type(experts)
    with torch.no_grad(), Watching(experts) as seen:
        expected = experts(*given)
    matrices = {f"{leaf}{i}": ExpertMatrix(experts, leaf, i) for leaf in expert_matrices(experts) for i in range(3)}
    assert {own.leaf for own in matrices.values()} == {leaf for leaf, _ in experts.named_parameters()}
    with torch.no_grad(), expert_moments(matrices) as found:
        torch.testing.assert_close(experts(*given), expected)
    assert type(experts) is before
    wanted = {f"{leaf}{i}": sum(own.T @ own for own in rows) for (leaf, i), rows in seen.given.items()}
    wanted = {key: own for key, own in wanted.items() if own.any()}
    assert found.keys() == wanted.keys()
    assert any("1" in key for key in found) == (family == "inkling")
    for key, own in wanted.items():
        torch.testing.assert_close(found[key], own)


def _inner(experts: Any, rows: Tensor, expert: int) -> Tensor:
    matrix = experts.gate_up_proj[expert]
    y = rows @ (matrix if experts.is_transposed else matrix.T)
    return experts._apply_gate(y + experts.gate_up_proj_bias[expert] if experts.has_bias else y)


def logits(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(2, 12, (16, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits


def test_experts_are_better_at_the_same_rate(tmp_path: Path, source: Path, text: Path) -> None:
    experts = "*experts*proj.weight" if source.name == "by expert" else "*experts*proj"
    options = CompressOptions(Target("bits", 2.0), include=(experts,), min_weights=1000)
    compress(source, tmp_path / "plain", options)
    report = compress(source, tmp_path / "text", options, calibrate=TextData(text, 64, 16))
    assert report.calibration is not None
    assert report.calibration.weights[0] == report.calibration.weights[1] == 4 * 3 * 64 * 64
    assert report.calibration is not None
    assert len(report.calibration.layers) == 12 if source.name == "by expert" else 8
    expected, errors = logits(source), []
    for name in ("plain", "text"):
        decompress(tmp_path / name, tmp_path / f"{name}-dense", verify=True)
        errors.append(float((logits(tmp_path / f"{name}-dense") - expected).norm()))
    assert errors[1] < 0.9 * errors[0]
    assert report.manifest.report.bits_per_weight == pytest.approx(2.0, rel=0.03)


def test_moments_of_experts_below_each_other_in_one_matrix() -> None:
    """DBRX has no third axis, and multiplies by the matrices of two parameters transposed, and of the third as is."""
    kind = import_module("transformers.models.dbrx.modeling_dbrx").DbrxExperts
    sizes = {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "ffn_act_fn": {"name": "silu"}}
    experts = kind(SimpleNamespace(**sizes))
    torch.manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3)
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    chosen = torch.tensor([[0, 3], [2, 3], [0, 2], [2, 0], [3, 2]])  # 1 has no token
    mlp, asked = experts.mlp, range(3)
    matrices = {f"{leaf}{i}": ExpertMatrix(mlp, leaf, i) for leaf in expert_matrices(mlp) for i in asked}
    assert {key: own.width for key, own in matrices.items() if own.expert == 2} == {"w12": 64, "v12": 64, "w22": 32}
    with torch.no_grad():
        expected = experts(x, chosen, weights)
        with expert_moments(matrices) as found:
            torch.testing.assert_close(experts(x, chosen, weights), expected)
    assert type(mlp).__name__ == "DbrxExpertGLU"
    assert found.keys() == {"w10", "v10", "w20", "w12", "v12", "w22"}
    for expert in (0, 2):
        rows = x[(chosen == expert).any(1)]
        w1, v1 = (own.detach()[32 * expert : 32 * expert + 32] for own in (mlp.w1, mlp.v1))
        inner = torch.nn.functional.silu(rows @ w1.T) * (rows @ v1.T)
        for name, given in (("w1", rows), ("v1", rows), ("w2", inner)):
            torch.testing.assert_close(found[f"{name}{expert}"], given.T @ given, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [("jetmoe", "*_linear.weight"), ("llama4_text", "*.experts.*"), ("dbrx", "*.experts.mlp.*")],
)
def test_experts_with_a_forward_of_their_own_are_calibrated(
    tmp_path: Path, text: Path, family: str, pattern: str
) -> None:
    ZOO[family].build().float().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    options = CompressOptions(Target("bits", 2.0), include=(pattern,), min_weights=512)
    compress(tmp_path / "model", tmp_path / "plain", options)
    report = compress(tmp_path / "model", tmp_path / "out", options, calibrate=TextData(text, 64, 16))
    assert report.calibration is not None
    assert not any("known form" in reason for reason in report.calibration.left.values())
    assert report.calibration.weights[0] >= 0.7 * report.calibration.weights[1] > 0
    expected, errors = logits(tmp_path / "model"), []
    for name in ("plain", "out"):
        decompress(tmp_path / name, tmp_path / f"{name}-dense", verify=True)
        errors.append(float((logits(tmp_path / f"{name}-dense") - expected).norm()))
    assert errors[1] < 0.9 * errors[0]


def test_more_experts_than_fit_are_seen_in_turns(
    tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments_module, "EXPERT_MOMENTS", 0)
    report = compress(source, tmp_path / "out", OPTIONS, calibrate=TextData(text, 16, 16))
    assert report.calibration is not None
    assert not any("no token" in reason for reason in report.calibration.left.values())


def test_the_command_says_what_was_reached(tmp_path: Path, source: Path, text: Path) -> None:
    arguments = ("compress", source, tmp_path / "out", "--bits", "3", "--min-weights", "512", "--calibrate", text)
    done = run(*arguments, "--samples", "16", "--seq-length", "16", "-q", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["calibration"]
    left = {own["name"]: own["reason"] for own in told["not_calibrated"]}
    assert told["of_matrices"] - told["matrices"] == len(left)
    assert told["of_matrices"] == KINDS[source.name][2]
    assert "an embedding, which is looked up" in left["model.embed_tokens.weight"]
    assert "lm_head.weight" not in left
    assert not any(name.endswith(("proj", "proj.weight")) for name in left)
    assert f"{told['matrices']} weights calibrated, of {told['of_matrices']}: {told['weights']:,} of" in done.stderr
    assert "not calibrated, an embedding, which is looked up" in done.stderr


def test_nothing_calibrated_is_an_error(tmp_path: Path, source: Path, text: Path) -> None:
    options = CompressOptions(Target("bits", 3.0), include=("*embed_tokens*", "lm_head*"), min_weights=1)
    with pytest.raises(ConfigError, match=r"calibrate: expected .* none among 2: .* an embedding, which is looked up"):
        compress(source, tmp_path / "out", options, calibrate=TextData(text, 16, 16))
    assert not (tmp_path / "out").exists()
