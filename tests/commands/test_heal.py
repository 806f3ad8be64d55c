"""heal: nearer to the original at the same positions, what is stored is what was trained, interruptions are undone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.settings import Healing
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.manifest import SUFFIXES
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.run import Run

pytest.importorskip("transformers")

from spectral_surgery.commands.heal import heal
from spectral_surgery.hf.models import load_model
from spectral_surgery.text.settings import TextData
from spectral_surgery.training.settings import DistillSettings
from tests.commands.test_calibrate import KINDS, save_model
from tests.commands.test_train import save_tokenizer

ROOT = Path(__file__).parents[2]
FILES = ("model.safetensors", "spectral_surgery.json")
FEW = DistillSettings(steps=12, eval_every=4, warmup_steps=2, learning_rate=0.05)
MANY = DistillSettings(steps=40, eval_every=20, warmup_steps=2, learning_rate=0.05)
FAST = DistillSettings(steps=12, eval_every=4, warmup_steps=2, learning_rate=0.3)
SPARSE = CompressOptions(Target("density", 0.2))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "out"
    compress(bert, out, SPARSE)
    return out


def distance(folder: Path, original: Path, *, causal: bool) -> float:
    """From the outputs of the original, as healing judges them: KL of the next token, or error of hidden states."""
    ids = torch.randint(2, 12, (20, 8), generator=torch.Generator().manual_seed(9))
    found = []
    for own in (folder, original):
        model, _ = load_model(own, "AutoModelForCausalLM" if causal else "AutoModel", dtype=torch.float32)
        with torch.inference_mode():
            found.append(model(input_ids=ids)[0])
    if causal:
        one, other = (own.log_softmax(-1) for own in found)
        return float((other.exp() * (other - one)).sum(-1).mean())
    return float((found[0] - found[1]).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_the_healed_model_is_nearer_at_the_same_positions(tmp_path: Path, kind: str, text: Path) -> None:
    source = save_model(kind, tmp_path / "model")
    compress(source, tmp_path / "sparse", SPARSE)
    report = heal(tmp_path / "sparse", source, tmp_path / "healed", TextData(text, 0, 16, 16), MANY)
    assert report.curve.best < 0.9 * report.curve.held_out[0][1]
    assert not report.untrained
    before, after = open_compressed(tmp_path / "sparse"), open_compressed(tmp_path / "healed")
    for name, record in after.manifest.tensors.items():
        for part in range(len(record.parts)):
            kept = before.part(name, part).decode().codes != 0
            assert not (after.part(name, part).decode().codes != 0)[~kept].any()
    assert str(after.manifest.options["healing"]).endswith(f"step {report.curve.best_step} of 40")
    for name in ("sparse", "healed"):
        decompress(tmp_path / name, tmp_path / f"{name}-plain", verify=True)
    plain = (tmp_path / "sparse-plain", tmp_path / "healed-plain")
    errors = [distance(own, source, causal=kind != "bert") for own in plain]
    assert errors[1] < 0.95 * errors[0]
    assert (tmp_path / "healed" / "heal.png").stat().st_size > 1000
    assert json.loads((tmp_path / "healed" / "heal.json").read_text())["held_out_after"] == report.curve.best
    assert "heal" in (tmp_path / "healed" / "README.md").read_text()


def test_what_is_stored_is_what_was_trained(tmp_path: Path, sparse: Path, bert: Path, text: Path) -> None:
    report = heal(sparse, bert, tmp_path / "out", TextData(text, 0, 16, 16), FEW)
    # the held-out loss of the stored model, as the start of another healing
    again = heal(
        tmp_path / "out",
        bert,
        tmp_path / "again",
        TextData(text, 0, 16, 16),
        DistillSettings(steps=1),
    )
    assert again.curve.held_out[0][1] == pytest.approx(report.curve.best, rel=1e-5)
    decompress(tmp_path / "out", tmp_path / "plain")
    trained, _ = load_model(tmp_path / "plain", "AutoModel", dtype=torch.float32)
    stored, _ = load_model(tmp_path / "out", "AutoModel", dtype=torch.float32)
    ids = torch.arange(2, 12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(stored(ids).last_hidden_state, trained(ids).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks", [False, True])
def test_biases_and_norms_are_healed_and_nothing_else_that_is_copied(
    tmp_path: Path, bert: Path, text: Path, blocks: bool
) -> None:
    compress(bert, tmp_path / "sparse", CompressOptions(Target("density", 0.2), include=("*encoder*",)))
    heal(tmp_path / "sparse", bert, tmp_path / "out", TextData(text, 0, 16, 16), FEW, blocks=blocks)
    before, after = (open_compressed(tmp_path / name).index.tensors for name in ("sparse", "out"))
    assert before.keys() == after.keys()
    copied = [name for name in before if not name.endswith(SUFFIXES)]
    changed = {name for name in copied if not torch.equal(read_tensor(before[name]), read_tensor(after[name]))}
    inside = "encoder.layer" if blocks else ""  # the embeddings' norm is in no block
    assert changed >= {name for name in copied if "LayerNorm" in name and inside in name}
    assert all(len(before[name].shape) == 1 for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in copied)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, sparse: Path, bert: Path, text: Path) -> None:
    data = TextData(text, 0, 16, 16)
    heal(sparse, bert, tmp_path / "whole", data, FEW)

    def stop(done: int, _: int, what: str) -> None:
        if what and done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(sparse, bert, tmp_path / "parts", data, FEW, run=Run(progress=stop))
    with pytest.raises(CheckpointError, match=r"parts\.partial: expected an empty folder, got unfinished work"):
        heal(sparse, bert, tmp_path / "parts", data, FEW)
    other = DistillSettings(steps=13, eval_every=4)
    with pytest.raises(
        CheckpointError, match=r"expected work of these models, text and settings, got others\. Use --overwrite"
    ):
        heal(sparse, bert, tmp_path / "parts", data, other, run=Run(resume=True))
    done: list[int] = []
    heal(sparse, bert, tmp_path / "parts", data, FEW, run=Run(resume=True, progress=lambda step, *_: done.append(step)))
    assert done[0] == 5  # the last evaluation was after step 4
    for file in FILES:
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "parts.partial").exists()
    assert not (tmp_path / "parts" / "healing").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_block_after_block(tmp_path: Path, kind: str, text: Path) -> None:
    source = save_model(kind, tmp_path / "model")
    compress(source, tmp_path / "sparse", SPARSE)
    data = TextData(text, 0, 16, 16)
    report = heal(tmp_path / "sparse", source, tmp_path / "healed", data, MANY, blocks=True)
    assert len(report.blocks) == 2
    assert all(after < 0.95 * before for before, after in report.blocks.values())
    assert report.curve.step == 80
    inside = [name for name in report.manifest.tensors if ".0." in name or ".1." in name]
    assert report.trained[0] == len(inside)
    assert set(report.untrained) == set(report.manifest.tensors) - set(inside)
    for name in ("sparse", "healed"):
        decompress(tmp_path / name, tmp_path / f"{name}-plain", verify=True)
    plain = (tmp_path / "sparse-plain", tmp_path / "healed-plain")
    errors = [distance(own, source, causal=False) for own in plain]
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_interrupted_blocks_go_on_to_the_same_bytes(tmp_path: Path, sparse: Path, bert: Path, text: Path) -> None:
    data = TextData(text, 0, 16, 16)
    heal(sparse, bert, tmp_path / "whole", data, FEW, blocks=True)

    def stop(done: int, _: int, what: str) -> None:
        if what.startswith("block 2") and done == 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(sparse, bert, tmp_path / "parts", data, FEW, blocks=True, run=Run(progress=stop))
    done: list[int] = []

    def note(step: int, *_: object) -> None:
        done.append(step)

    heal(sparse, bert, tmp_path / "parts", data, FEW, blocks=True, run=Run(resume=True, progress=note))
    assert done[0] == 17  # of the second block, the last evaluation was after step 4
    for file in FILES:
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_damaged_unfinished_work_is_named(tmp_path: Path, sparse: Path, bert: Path, text: Path) -> None:
    (tmp_path / "out.partial" / "healing").mkdir(parents=True)
    (tmp_path / "out.partial" / "healing" / "all.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="expected unfinished work, got an error"):
        heal(sparse, bert, tmp_path / "out", TextData(text, 0, 16, 16), FEW, run=Run(resume=True))


def test_compress_with_calibration_and_healing_resumes(tmp_path: Path, bert: Path, text: Path) -> None:
    options, data = CompressOptions(Target("bits", 2.0)), TextData(text, 0, 16, 16)
    calibration = TextData(text, 32, 16)

    def stop(done: int, _: int, what: str) -> None:
        if what.startswith("loss") and done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(
            bert, tmp_path / "out", options, calibrate=calibration, heal=Healing(data, FAST), run=Run(progress=stop)
        )
    assert (tmp_path / "out.partial" / "unhealed").exists()
    with pytest.raises(CheckpointError, match=r"out\.partial: expected work of these options, got that of others"):
        compress(bert, tmp_path / "out", SPARSE, calibrate=calibration, heal=Healing(data, FEW), run=Run(resume=True))
    report = compress(
        bert, tmp_path / "out", options, calibrate=calibration, heal=Healing(data, FAST), run=Run(resume=True)
    )
    assert report.healing is not None
    assert report.healing.curve.step == 12
    assert not (tmp_path / "out.partial").exists()
    assert report.manifest.options["calibration"]
    assert report.output_bytes < report.input_bytes / 4
    assert report.manifest.report.bits_per_weight < 2.02  # as asked, though training makes codes more even


def test_a_rising_loss_stops_early_and_keeps_the_start(tmp_path: Path, sparse: Path, bert: Path, text: Path) -> None:
    wild = DistillSettings(steps=40, eval_every=2, patience=2, warmup_steps=1, learning_rate=30.0)
    report = heal(sparse, bert, tmp_path / "out", TextData(text, 0, 16, 16), wild)
    assert report.curve.best_step == 0
    assert report.curve.step < 40
    assert report.curve.best == report.curve.held_out[0][1]


def test_what_healing_refuses(tmp_path: Path, sparse: Path, bert: Path, text: Path) -> None:
    other = save_model("llama", tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"expected the checkpoint that it was made from, got .*llama"):
        heal(sparse, other, tmp_path / "out", TextData(text))
    (tmp_path / "short.txt").write_text("one line")
    with pytest.raises(ConfigError, match=r"heal --blocks: expected --device cpu, got cuda\. Leave one"):
        heal(sparse, bert, tmp_path / "out", TextData(text), FEW, blocks=True, device="cuda")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="two or more sequences of up to 128 tokens, got 2 tokens"):
        heal(sparse, bert, tmp_path / "out", TextData(tmp_path / "short.txt"))
    wild = DistillSettings(steps=4, learning_rate=1e37, warmup_steps=0)
    with pytest.raises(ConfigError, match=r"distil: expected a finite loss, got (nan|inf) at step \d"):
        heal(sparse, bert, tmp_path / "nan", TextData(text, 0, 16, 16), wild)
    with pytest.raises(ConfigError, match="--learning-rate: expected a positive number, got nan"):
        DistillSettings(learning_rate=float("nan"))
    with pytest.raises(ConfigError, match="--steps: expected 1 or more, or --minutes, got 0"):
        DistillSettings(steps=0)
    with pytest.raises(ConfigError, match=r"nothing\.txt: expected a text, \.csv or \.jsonl file.* got no such file"):
        heal(sparse, bert, tmp_path / "out", TextData(tmp_path / "nothing.txt"))
    assert not (tmp_path / "out").exists()


def test_tokens_that_the_model_does_not_know(tmp_path: Path, text: Path) -> None:
    source = save_model("bert", tmp_path / "model")
    compress(source, tmp_path / "sparse", SPARSE)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {w: n + 5 * (n > 1) for w, n in tokenizer["model"]["vocab"].items()}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"expected tokens below 12, got 1\d\. Use the tokenizer of this very model"):
        heal(tmp_path / "sparse", source, tmp_path / "out", TextData(text, 0, 16, 16), FEW)


def save_other(kind: str, folder: Path) -> Path:
    import transformers

    sizes = {"vocab_size": 12, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "moe":
        moe = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **moe, head_dim=32))
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.data.mul_(20)  # so that they matter
    else:
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_what_is_not_trained_counts_as_it_is_stored(tmp_path: Path, text: Path) -> None:
    source = save_other("moe", tmp_path / "model")
    compress(source, tmp_path / "experts", CompressOptions(Target("bits", 1.0)))
    report = heal(tmp_path / "experts", source, tmp_path / "out", TextData(text, 0, 16, 16), FEW)
    assert len(report.untrained) == 12  # experts, which the model fuses
    with_experts = report.curve.held_out[0][1]
    compress(source, tmp_path / "rest", CompressOptions(Target("bits", 1.0), exclude=("*experts*",)))
    report = heal(tmp_path / "rest", source, tmp_path / "other", TextData(text, 0, 16, 16), FEW)
    assert report.curve.held_out[0][1] < 0.9 * with_experts
    report = heal(
        tmp_path / "experts",
        source,
        tmp_path / "by-block",
        TextData(text, 0, 16, 16),
        FEW,
        blocks=True,
    )
    assert len(report.untrained) == 12


def test_classifiers_heal(tmp_path: Path, text: Path) -> None:
    source = save_other("classes", tmp_path / "model")
    compress(source, tmp_path / "sparse", SPARSE)
    report = heal(tmp_path / "sparse", source, tmp_path / "out", TextData(text, 0, 16, 16), MANY)
    assert report.objective == "classes"
    assert report.curve.best < report.curve.held_out[0][1]


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=True)
    return result.exit_code, result.output + (repr(result.exception) if result.exception else "")


@pytest.mark.slow
def test_commands(tmp_path: Path, sparse: Path, bert: Path, text: Path) -> None:
    code, said = run(
        "heal", sparse, bert, tmp_path / "a", "--data", text, "--steps", 4, "--eval-every", 2, "--json", "-q"
    )
    assert code == 0, said
    body = json.loads(said)
    assert body["objective"] == "embeddings"
    assert len(body["curve"]["held_out"]) == 3
    code, said = run("compress", bert, tmp_path / "b", "--sparsity", 0.2, "--heal", text, "--steps", 4, "-q")
    assert code == 0, said
    assert "coefficients trained, step 4 of 4 kept" in said
    code, said = run("heal", sparse, bert, tmp_path / "c", "--data", text, "--steps", 4, "--minutes", 1)
    assert code == 2
    assert "expected one of --steps, --minutes, got all" in said
    code, said = run("compress", bert, tmp_path / "d", "--bits", 3, "--heal", text, "--shard", "0/2")
    assert code == 2
    assert "expected a whole model" in said


@pytest.mark.slow
def test_two_processes_heal_together(tmp_path: Path, sparse: Path, bert: Path, text: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "spectral_surgery"]
    words = ["heal", sparse, bert, tmp_path / "out", "--data", text, "--steps", 8, "--batch-size", 8, "--json", "-q"]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, words)],
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    body = json.loads(done.stdout)
    assert body["held_out_after"] < body["held_out_before"]
    open_compressed(tmp_path / "out")
