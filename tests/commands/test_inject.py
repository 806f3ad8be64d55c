"""inject: a fresh adapter from headers alone is the one that a live model would get, and changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click import Context
from click.testing import CliRunner, Result

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.cli import adapter_options, cli
from spectral_surgery.commands.inject import inject, plan_injection
from spectral_surgery.errors import CheckpointError, ConfigError, TargetError
from spectral_surgery.files.peft.adapter_files import TENSOR_FILE, read_adapter
from spectral_surgery.live import attach
from spectral_surgery.live.choose_targets import candidates
from spectral_surgery.live.skeleton import skeleton
from spectral_surgery.options import in_words, parse_settings, settings_of
from spectral_surgery.targets import ModuleTargets
from tests.support.checkpoints import gaussian, llama_like, write_folder
from tests.support.tiny import MODELS, outputs, tiny

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    for kind in MODELS:
        tiny(kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in MODELS}


def small(method: str) -> object:
    settings = (
        {"n_frequency": 30} if "n_frequency" in {s.name for s in settings_of(METHODS[method].config)} else {"r": 2}
    )
    return METHODS[method].config(**settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_what_a_live_model_gets(saved: dict[str, Path], tmp_path: Path, kind: str, method: str) -> None:
    spec = AdapterSpec(METHODS[method], small(method), ModuleTargets(MODELS[kind].targets, bias="all"))
    plan = inject(saved[kind], tmp_path / "out", spec)
    live, state = tiny(kind), read_adapter(tmp_path / "out")
    before = outputs(kind, live)
    settled = attach.inject(live, replace(spec, targets=plan.spec.targets))
    expected = attach.state_of(live, settled)
    assert state.layers.keys() == expected.layers.keys() == plan.layers.keys()
    assert state.extra.keys() == expected.extra.keys()
    assert all(torch.equal(state.extra[name], expected.extra[name]) for name in state.extra)
    assert state.spec.targets.fan_in_fan_out == settled.targets.fan_in_fan_out
    assert plan.trained == attach.trainable_parameters(live)[0]
    fresh = tiny(kind)
    attach.load(fresh, state)
    assert torch.equal(outputs(kind, fresh), before)


@pytest.mark.parametrize("kind", MODELS)
def test_the_skeleton_has_the_layers_of_the_model(kind: str) -> None:
    pytest.importorskip("transformers")
    model = tiny(kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    bones = skeleton(shapes, kind)
    found = {name: type(module).__name__ for name, module in candidates(bones, everything=True)}
    assert found == {name: type(module).__name__ for name, module in candidates(model, everything=True)}
    assert {name: tuple(tensor.shape) for name, tensor in bones.state_dict().items()} == shapes
    assert all(parameter.is_meta for parameter in bones.parameters())


def test_the_skeleton_of_other_modules() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "patch.proj.weight": (8, 3, 4, 4),
        "a.gate.weight": (4, 8),
        "a.type.weight": (4, 8),
        "embed_out.weight": (9, 8),
        "shared.weight": (9, 8),
        "norm.weight": (8,),
        "experts.up": (2, 8, 8),
        "top": (3,),
    }
    found = {name: type(module).__name__ for name, module in candidates(skeleton(shapes), everything=True)}
    assert found == {"patch.proj": "Conv2d", "a.type": "Linear", "embed_out": "Linear", "shared": "Embedding"}


def test_usual_targets_are_found_and_auto_is_settled(saved: dict[str, Path], tmp_path: Path) -> None:
    row = METHODS["fourierft"]
    spec = AdapterSpec(row, row.config(n_frequency=9, scaling="auto"))
    plan = inject(saved["llama"], tmp_path / "out", spec)
    assert {name.rpartition(".")[2] for name in plan.layers} == {"q_proj", "v_proj"}
    assert plan.spec.config.scaling > 0
    assert plan.spec.task_type == "CAUSAL_LM"
    assert plan.stored_bytes < (tmp_path / "out" / TENSOR_FILE).stat().st_size
    everything = plan_injection(
        saved["llama"], AdapterSpec(row, row.config(n_frequency=9), ModuleTargets("all-linear"))
    )
    assert len(everything.layers) == 14
    assert "lm_head" not in everything.layers


def test_the_seed_decides(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", llama_like())
    spec = AdapterSpec(METHODS["lora"], METHODS["lora"].config(r=2), ModuleTargets(("q_proj",)))
    before = torch.random.get_rng_state()
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        inject(base, tmp_path / f"out{number}", spec, seed=seed)
        drawn.append((tmp_path / f"out{number}" / TENSOR_FILE).read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_modules_to_save_are_copied(tmp_path: Path) -> None:
    tensors = llama_like() | {"score.weight": gaussian(3, 96)}
    base = write_folder(tmp_path / "base", tensors)
    targets = ModuleTargets(("q_proj",), modules_to_save=("score",))
    inject(base, tmp_path / "out", AdapterSpec(METHODS["lora"], METHODS["lora"].config(r=2), targets))
    assert torch.equal(read_adapter(tmp_path / "out").extra["score.weight"], tensors["score.weight"])
    with pytest.raises(TargetError, match=r"modules_to_save: expected names, or ends of names, in.*base"):
        plan_injection(
            base,
            AdapterSpec(
                METHODS["lora"], METHODS["lora"].config(), ModuleTargets(("q_proj",), modules_to_save=("head",))
            ),
        )


def test_bad_input_is_refused_and_nothing_written(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", llama_like())
    marked = write_folder(tmp_path / "marked", llama_like(), config={"quantization_config": {}})
    row, out = METHODS["fourierft"], tmp_path / "out"
    for source, count, targets, error, match in (
        (marked, 9, ("q_proj",), CheckpointError, "marked: expected a plain checkpoint, got one quantised already"),
        (base, 9, ("nothing",), TargetError, r"target_modules:.*got \('nothing',\), which matches none of 4"),
        (base, 0, ("q_proj",), ConfigError, "n_frequency: expected 1 to 12480 for a layer of 130 x 96, got 0"),
        (base, 12481, ("q_proj",), ConfigError, "n_frequency: expected 1 to 12480 .* got 12481"),
    ):
        with pytest.raises(error, match=match):
            inject(source, out, AdapterSpec(row, row.config(n_frequency=count), ModuleTargets(targets)))
    with pytest.raises(CheckpointError, match="expected a folder apart from the source, got one that overlaps"):
        inject(base, base / "adapter", AdapterSpec(row, row.config(n_frequency=9), ModuleTargets(("q_proj",))))
    assert not out.exists()


@pytest.mark.parametrize(
    ("method", "pairs", "expected"),
    [
        (
            "fourierft",
            ["n_frequency=7", "scaling=auto", "init_weights=False"],
            {"n_frequency": 7, "scaling": "auto", "init_weights": False},
        ),
        ("fourierft", ["scaling=3", "scaling=4.5"], {"scaling": 4.5}),
        ("foura", ["transform=hartley", 'rank_pattern={"q": 3}'], {"transform": "hartley", "rank_pattern": {"q": 3}}),
    ],
)
def test_settings_are_read_by_their_types(method: str, pairs: list[str], expected: dict[str, object]) -> None:
    row = METHODS[method].config
    assert parse_settings(row, pairs) == row(**expected)


@pytest.mark.parametrize(
    ("method", "pair", "match"),
    [
        ("lora", "r", "-o r: expected NAME=VALUE, such as r="),
        ("lora", "rank=3", "-o rank=3: expected one of r, lora_alpha, rank_pattern, alpha_pattern, got 'rank'"),
        ("fourierft", "n_frequenzy=3", "Did you mean n_frequency?"),
        ("lora", "r=2.5", r"-o r=2\.5: expected a whole number, got '2\.5'\. Rank\."),
        ("lora", "rank_pattern=3", r"-o rank_pattern=3: expected \{\"pattern\": a whole number\}, got '3'"),
        ("lora", "rank_pattern={", "-o rank_pattern={: expected "),
        ("foura", "transform=fft", "-o transform=fft: expected dct or hartley or dft, got 'fft'"),
        ("foura", "use_gate=1", "-o use_gate=1: expected true or false, got '1'"),
        ("fourierft", "scaling=big", "-o scaling=big: expected a number or auto, got 'big'"),
    ],
)
def test_wrong_settings_say_what_is_accepted(method: str, pair: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_settings(METHODS[method].config, [pair])


def test_every_setting_of_every_method_has_help_and_accepts_its_default() -> None:
    for row in METHODS.values():
        for setting in settings_of(row.config):
            text = json.dumps(setting.default) if isinstance(setting.default, (dict, bool)) else str(setting.default)
            assert setting.help
            assert getattr(parse_settings(row.config, [f"{setting.name}={text}"]), setting.name) == setting.default
    assert in_words(str) == "a text"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("--target-modules", "q_proj,v_proj", "--layers", "0,2-4"),
            ModuleTargets(("q_proj", "v_proj"), None, (0, 2, 3, 4)),
        ),
        (
            ("--target-modules", r".*\.(q|v)_proj", "--exclude-modules", "model.layers.0.q_proj"),
            ModuleTargets(r".*\.(q|v)_proj", ("model.layers.0.q_proj",)),
        ),
        (
            ("--target-modules", "all-linear", "--modules-to-save", "score,lm_head", "--bias", "all"),
            ModuleTargets("all-linear", modules_to_save=("score", "lm_head"), bias="all"),
        ),
        (("--bias", "only"), ModuleTargets(bias="lora_only")),
    ],
)
def test_options_of_targets(arguments: tuple[str, ...], expected: ModuleTargets) -> None:
    command = cli.get_command(Context(cli), "inject")
    assert command is not None
    with command.make_context("inject", ["./base", "./out", "--method", "lora", *arguments]) as context:
        assert adapter_options.spec_of("./base", None, context.params["bias"]).targets == expected


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["inject", *map(str, arguments)])


def test_command(tmp_path: Path) -> None:
    base, out = write_folder(tmp_path / "base", llama_like() | {f"{Q}.bias": gaussian(130)}), tmp_path / "out"
    options = ("--method", "fourierft", "-o", "n_frequency=5", "--target-modules", "q_proj,down_proj")
    plan = invoke(base, out, *options, "--dry-run")
    assert "fourierft on 2 layers: 10 trained parameters, 0.011% of 89,513; 40 B" in plan.stdout
    assert "Nothing was written." in plan.stdout
    body = json.loads(invoke(base, out, *options, "--bias", "only", "--dry-run", "--json").stdout)
    assert (body["dry_run"], body["trained_parameters"], body["stored_bytes"]) == (True, 140, 40 + 520)
    assert not out.exists()
    done = invoke(base, out, *options, "--bias", "only", "-q")
    assert f"trained whole: {Q}.base_layer.bias, 130 parameters" in done.stdout
    assert read_adapter(out).spec.targets.bias == "fourierft_only"
    assert read_adapter(out).spec.base_model == str(base)
    assert "expected a new or empty folder, got one with content" in str(invoke(base, out, *options).exception)
