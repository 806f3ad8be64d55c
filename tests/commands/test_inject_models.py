"""inject asks the model that transformers builds: PEFT loads all that it writes, and computes what we compute."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.cli import cli
from spectral_surgery.commands.inject import inject, plan_injection
from spectral_surgery.errors import ConfigError, TargetError
from spectral_surgery.files.peft.adapter_files import TENSOR_FILE, read_adapter
from spectral_surgery.live import attach
from spectral_surgery.targets import ModuleTargets
from tests.zoo.entries import ZOO

# PEFT asks transformers for a property by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = TEXT | SIZES | {"max_position_embeddings": 32}
LLAMA = BERT | {"num_key_value_heads": 2}
BART = TEXT | {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32},
}
IMAGE = SIZES | {"image_size": 16, "patch_size": 8}
EXPERTS = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 32, "decoder_start_token_id": 1}


@dataclass(frozen=True)
class Case:
    """A model, the task its adapter has, what is trained whole, and how many layers all-linear means."""

    config: str
    model: str
    settings: dict[str, Any]
    layers: int
    task: str | None
    saved: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("input_ids",)

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.settings))
        return model.eval()

    def given(self) -> dict[str, Tensor]:
        every = {
            "input_ids": torch.tensor([[*range(3, 14), 2], [*range(20, 31), 2]]),  # the last one ends the text
            "decoder_input_ids": torch.arange(3, 13).reshape(2, 5),
            "pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16),
            "input_features": torch.linspace(-1, 1, 2 * 8 * 16).reshape(2, 8, 16),
        }
        return {name: every[name] for name in self.inputs}


CASES = {
    "llama": Case("LlamaConfig", "LlamaForCausalLM", LLAMA, 14, "CAUSAL_LM"),
    "mixtral": Case("MixtralConfig", "MixtralForCausalLM", LLAMA | EXPERTS, 8, "CAUSAL_LM"),
    "qwen2_moe": Case(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        LLAMA | EXPERTS | {"shared_expert_intermediate_size": 24},
        16,
        "CAUSAL_LM",
    ),
    "phimoe": Case("PhimoeConfig", "PhimoeForCausalLM", LLAMA | EXPERTS, 8, "CAUSAL_LM"),
    "bert-classifier": Case("BertConfig", "BertForSequenceClassification", BERT, 13, "SEQ_CLS", ("classifier",)),
    "bert-tagger": Case("BertConfig", "BertForTokenClassification", BERT, 12, "TOKEN_CLS", ("classifier",)),
    "bert-answers": Case("BertConfig", "BertForQuestionAnswering", BERT, 12, "QUESTION_ANS", ("qa_outputs",)),
    "roberta-classifier": Case(
        "RobertaConfig", "RobertaForSequenceClassification", BERT, 12, "SEQ_CLS", ("classifier",)
    ),
    "distilbert-classifier": Case(
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        TEXT | {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        12,
        "SEQ_CLS",
        ("pre_classifier", "classifier"),
    ),
    "bart-classifier": Case(
        "BartConfig", "BartForSequenceClassification", BART, 16, "SEQ_CLS", ("classification_head",)
    ),
    "vit": Case("ViTConfig", "ViTForImageClassification", IMAGE, 12, None, (), ("pixel_values",)),
    "clip": Case(
        "CLIPConfig",
        "CLIPModel",
        {"text_config": BERT, "vision_config": IMAGE, "projection_dim": 16},
        26,
        None,
        (),
        ("input_ids", "pixel_values"),
    ),
    "whisper": Case(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        WHISPER,
        16,
        None,
        (),
        ("input_features", "decoder_input_ids"),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, case in CASES.items():
        case.build().save_pretrained(root / name)
    return {name: root / name for name in CASES}


def spec_of(method: str, targets: ModuleTargets | None = None, **settings: Any) -> AdapterSpec:
    row = METHODS[method]
    return AdapterSpec(row, row.config(**settings), targets or ModuleTargets("all-linear"))


def noisy(folder: Path) -> None:
    """Give the adapter in a folder numbers that change something."""
    tensors = load_file(folder / TENSOR_FILE)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "lora_B" in name or "spectrum" in name:
            tensor.add_(torch.randn(tensor.shape, generator=generator))
    save_file(tensors, folder / TENSOR_FILE, {"format": "pt"})


def logits(model: Any, case: Case) -> Tensor:
    with torch.no_grad():
        outputs = model(**case.given())
    return next(
        outputs[key] for key in ("logits", "logits_per_image", "start_logits", "last_hidden_state") if key in outputs
    )


def loaded_by_peft(folder: Path, adapter: Path) -> Any:
    """PEFT's model; whatever it warns of is an error, as everywhere in these tests."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return peft.PeftModel.from_pretrained(getattr(transformers, name).from_pretrained(folder), str(adapter)).eval()


@pytest.mark.parametrize("method", ["fourierft", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_peft_loads_everything_and_computes_the_same(
    folders: dict[str, Path], tmp_path: Path, name: str, method: str
) -> None:
    case, out = CASES[name], tmp_path / "out"
    spec = spec_of(method, **({"r": 1} if method == "lora" else {"n_frequency": 20, "scaling": 150.0}))
    plan = inject(folders[name], out, spec)
    noisy(out)
    assert (len(plan.layers), plan.spec.task_type) == (case.layers, case.task)
    assert plan.spec.targets.modules_to_save == case.saved
    wrapped = loaded_by_peft(folders[name], out)
    assert peft.get_peft_model_state_dict(wrapped).keys() == load_file(out / TENSOR_FILE).keys()
    live = case.build()
    before = logits(live, case)
    attach.load(live, read_adapter(out))
    assert not torch.allclose(before, logits(live, case), atol=1e-3)
    torch.testing.assert_close(logits(wrapped, case), logits(live, case), rtol=1e-3, atol=1e-4)


def test_the_head_is_copied(folders: dict[str, Path], tmp_path: Path) -> None:
    inject(folders["distilbert-classifier"], tmp_path / "out", spec_of("lora", r=2))
    stored = load_file(folders["distilbert-classifier"] / "model.safetensors")
    extra = read_adapter(tmp_path / "out").extra
    assert extra.keys() == {name for name in stored if "classifier" in name}
    assert all(torch.equal(extra[name], stored[name]) for name in extra)


def test_a_tied_head_is_copied_from_the_embedding(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "tied")
    targets = ModuleTargets(("q_proj",), modules_to_save=("lm_head",))
    inject(tmp_path / "tied", tmp_path / "out", spec_of("lora", targets, r=2))
    copied = read_adapter(tmp_path / "out").extra["lm_head.weight"]
    assert torch.equal(copied, model.lm_head.weight)


def test_a_head_that_is_not_in_the_files_is_no_reason_to_promise_one(tmp_path: Path) -> None:
    CASES["bert-classifier"].build().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "classifier" not in n}, file, {"format": "pt"})
    plan = plan_injection(tmp_path / "base", spec_of("lora", r=2))
    assert (plan.spec.task_type, plan.spec.targets.modules_to_save, plan.copied) == (None, (), {})
    assert plan.notes == ("the head classifier is not in the files: it is not trained, and the adapter has no task",)


def test_experts_are_left_out_and_said(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, command = folders["mixtral"], ("inject", "--method", "lora", "--target-modules", "all-linear")
    body = json.loads(CliRunner().invoke(cli, [*command, str(folder), "out", "--dry-run", "--json"]).stdout)
    reasons = {own["name"]: own["reason"] for own in body["left_out"]}
    assert reasons == dict.fromkeys(
        [f"model.layers.{n}.mlp.experts.{own}" for n in range(2) for own in ("gate_up_proj", "down_proj")],
        "experts in one tensor, and no linear layer",
    ) | {"lm_head": "a head"}
    assert body["task_type"] == "CAUSAL_LM"
    shown = CliRunner().invoke(cli, [*command, str(folder), str(tmp_path / "out"), "-q"]).stdout
    assert "left out, experts in one tensor, and no linear layer: 4 (model.layers.0.mlp.experts" in shown


def test_a_lora_avoids_names_that_peft_takes_for_experts(tmp_path: Path) -> None:
    sizes = (
        LLAMA | EXPERTS | {"n_routed_experts": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 8}
    )
    model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**sizes, first_k_dense_replace=1))
    model.save_pretrained(tmp_path / "glm")
    plan = inject(tmp_path / "glm", tmp_path / "out", spec_of("lora", r=1))
    assert {name.rpartition(".")[2] for name in plan.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert plan.left_out["model.layers.0.mlp.up_proj"] == "PEFT takes this name for experts"
    assert loaded_by_peft(tmp_path / "glm", tmp_path / "out")
    with pytest.raises(TargetError, match=r"target_modules:.*got model\.layers\.0\.mlp\.up_proj and 1 more, and"):
        plan_injection(tmp_path / "glm", spec_of("lora", ModuleTargets(("up_proj",)), r=1))
    assert len(plan_injection(tmp_path / "glm", spec_of("fourierft", n_frequency=9)).layers) == 14


def test_a_lora_avoids_what_fused_kernels_read_past(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    transformers.MambaForCausalLM(transformers.MambaConfig(**TEXT, **sizes)).save_pretrained(tmp_path / "mamba")
    plan = inject(tmp_path / "mamba", tmp_path / "out", spec_of("lora", r=1))
    assert "backbone.layers.0.mixer.out_proj" in plan.left_out
    assert loaded_by_peft(tmp_path / "mamba", tmp_path / "out")
    with pytest.raises(TargetError, match=r"target_modules:.*got backbone\.layers\.0\.mixer\.out_proj and 0 more"):
        plan_injection(tmp_path / "mamba", spec_of("lora", ModuleTargets(("out_proj",)), r=1))


@pytest.mark.parametrize("method", ["fourierft", "lora", "foura"])
def test_layers_that_multiply_in_groups_are_left_out_and_said(tmp_path: Path, method: str) -> None:
    model = ZOO["deepseek_v4"].build().float()
    model.save_pretrained(tmp_path / "grouped")
    setting = "n_frequency" if method == "fourierft" else "r"
    command = ["inject", str(tmp_path / "grouped"), str(tmp_path / "out"), "--method", method, "-o", f"{setting}=1"]
    body = json.loads(CliRunner().invoke(cli, [*command, "--target-modules", "all-linear", "--json"]).stdout)
    grouped = {f"model.layers.{number}.self_attn.o_a_proj" for number in range(len(model.model.layers))}
    assert {
        own["name"] for own in body["left_out"] if "another shape than those of a linear" in own["reason"]
    } == grouped
    assert f"{min(grouped)[:-8]}o_b_proj" in {own["layer"] for own in body["layers"]}
    live = loaded_by_peft(tmp_path / "grouped", tmp_path / "out")
    with torch.no_grad():
        assert live(torch.arange(3, 14)[None]).logits.isfinite().all()
    explicit = spec_of(method, ModuleTargets(("o_a_proj", "o_b_proj")), **{setting: 1})
    with pytest.raises(TargetError, match=rf"got {min(grouped)} and \d more: its outputs have another"):
        plan_injection(tmp_path / "grouped", explicit)


def test_tiny_layers_are_left_out_of_all_linear(tmp_path: Path) -> None:
    sizes = BERT | {"position_embedding_type": "rotary", "mask_token_id": 3}
    transformers.EsmForMaskedLM(transformers.EsmConfig(**sizes)).save_pretrained(tmp_path / "esm")
    plan = inject(tmp_path / "esm", tmp_path / "out", spec_of("fourierft", n_frequency=20))
    (tiny,) = (name for name, reason in plan.left_out.items() if reason.startswith("too small"))
    assert tiny == "esm.contact_head.regression"
    assert "n_frequency: expected 1 to 8" in plan.left_out[tiny]
    assert loaded_by_peft(tmp_path / "esm", tmp_path / "out")
    with pytest.raises(ConfigError, match="n_frequency: expected 1 to 1024 for a layer of 32 x 32, got 1025"):
        plan_injection(tmp_path / "esm", spec_of("fourierft", n_frequency=1025))


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="expected a linear layer beside 1 heads and experts, got none"):
        plan_injection(tmp_path, spec_of("lora", r=1))


DEFAULTS = {
    "deberta": ("DebertaConfig", "DebertaModel", BERT),
    "deberta-v2": ("DebertaV2Config", "DebertaV2Model", BERT),
    "mpt": ("MptConfig", "MptForCausalLM", TEXT | {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 32}),
    "codegen": (
        "CodeGenConfig",
        "CodeGenForCausalLM",
        TEXT | {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
    ),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", TEXT | {"hidden_size": 32, "num_hidden_layers": 1}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", TEXT | {"n_embd": 32, "n_layer": 1, "n_head": 4}),
    "bloom": ("BloomConfig", "BloomForCausalLM", TEXT | {"hidden_size": 32, "n_layer": 1, "n_head": 4}),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", BERT),
}


def outlined(name: str, folder: Path) -> nn.Module:
    """A model on the meta device, with its configuration and an empty file of weights in a folder."""
    config, model, settings = DEFAULTS[name]
    with torch.device("meta"):
        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    built.config.architectures = [model]
    built.config.save_pretrained(folder)
    save_file({"nothing": torch.ones(1)}, folder / "model.safetensors")
    return built


@pytest.mark.parametrize("name", DEFAULTS)
def test_without_targets_they_are_those_of_peft(name: str, tmp_path: Path) -> None:
    model = outlined(name, tmp_path)
    plan = plan_injection(tmp_path, spec_of("fourierft", ModuleTargets(), n_frequency=9))
    if name == "modernbert":  # PEFT knows no default
        assert {own.rpartition(".")[2] for own in plan.layers} == {"Wqkv"}
        return
    settings = peft.FourierFTConfig(n_frequency=9, fan_in_fan_out=name == "gpt2")
    wrapped = peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
    assert set(plan.layers) == set(wrapped.targeted_module_names)


def test_guessed_layers_are_said(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_injection(folders["llama"] / "model.safetensors", spec_of("lora", r=2))
    (note,) = plan.notes
    assert note.endswith("tensors, and PEFT may see others: there is no config.json")
    assert (len(plan.layers), plan.spec.task_type) == (14, None)
    config = {"model_type": "unheard", "architectures": ["UnheardForCausalLM"], "auto_map": {"AutoConfig": "a.B"}}
    save_file(load_file(folders["llama"] / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = plan_injection(tmp_path, spec_of("lora", r=2))
    assert "layers were guessed from the names and shapes of tensors" in plan.notes[0]
    assert (len(plan.layers), plan.spec.task_type) == (14, "CAUSAL_LM")


def test_a_name_that_ends_others_is_written_so_that_peft_takes_it_alone(tmp_path: Path) -> None:
    vision = IMAGE | {"model_type": "git_vision_model"}
    model = transformers.GitForCausalLM(transformers.GitConfig(**BERT, vision_config=vision))
    model.save_pretrained(tmp_path / "git")
    plan = inject(tmp_path / "git", tmp_path / "out", spec_of("lora", ModuleTargets(("output",)), r=2))
    assert list(plan.layers) == ["output"]
    assert plan.spec.targets.target_modules == "output"
    wrapped = loaded_by_peft(tmp_path / "git", tmp_path / "out")
    assert wrapped.targeted_module_names == ["output"]
    assert "output" not in plan_injection(tmp_path / "git", spec_of("lora", r=2)).layers
