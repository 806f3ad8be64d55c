"""merge and unmerge on files: the sums are right, everything else keeps its bits, and the base comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec, AdapterState
from spectral_surgery.adapters.fourierft import FourierFTConfig
from spectral_surgery.adapters.lora import LoraConfig
from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.merge import merge
from spectral_surgery.commands.merge.unmerge import unmerge
from spectral_surgery.errors import (
    CheckpointError,
    ConfigError,
    FormatVersionError,
    NotMergeableError,
    UnmergeError,
)
from spectral_surgery.files import merge_record
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.peft.adapter_files import write_adapter
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.progress import Progress
from spectral_surgery.targets import ModuleTargets
from tests.support.checkpoints import gaussian, llama_like, write_folder

Q, DOWN, EMBED, HEAD = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.embed_tokens",
    "lm_head",
)
SHAPES = {Q: (130, 96), DOWN: (96, 200), EMBED: (300, 96)}


def adapter(folder: Path, method: str = "lora", layers: tuple[str, ...] = (Q, DOWN), **fields: object) -> Path:
    """Write an adapter with random numbers."""
    config = LoraConfig(r=2, lora_alpha=4) if method == "lora" else FourierFTConfig(n_frequency=50, scaling=300.0)
    extra = fields.pop("extra", {})
    spec = AdapterSpec(METHODS[method], config, ModuleTargets(layers, **fields))
    tensors = {}
    for number, layer in enumerate(layers):
        fresh = spec.build(layer, *SHAPES[layer]).state_dict()
        tensors[layer] = {key: gaussian(*value.shape, seed=10 + number) for key, value in fresh.items()}
    write_adapter(AdapterState(spec, tensors, extra), folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(info) for name, info in read_index(folder).tensors.items()}


def delta_of(folder: Path, layer: str) -> torch.Tensor:
    from spectral_surgery.files.peft.adapter_files import read_adapter

    return read_adapter(folder).build(layer, *SHAPES[layer]).delta_weight()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n in a
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "base", llama_like(), shards=2, config={"model_type": "llama"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "fourierft"])
def test_merged_weights_are_the_sums_and_unmerge_gives_the_base_back(
    tmp_path: Path, dtype: torch.dtype, method: str
) -> None:
    base = write_folder(tmp_path / "base", llama_like(dtype))
    own = adapter(tmp_path / "adapter", method)
    report = merge(base, [own], tmp_path / "merged")
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    for layer in (Q, DOWN):
        name = f"{layer}.weight"
        expected = (before[name].float() + delta_of(own, layer)).to(dtype)
        torch.testing.assert_close(after[name], expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert not torch.equal(after[name], before[name])
        assert report.layers[name] > 0
    others = {name for name in before if name not in report.layers}
    assert same({n: before[n] for n in others}, {n: after[n] for n in others})
    unmerge(tmp_path / "merged", tmp_path / "again")
    assert same(tensors_of(tmp_path / "again"), before)
    assert not (tmp_path / "again" / merge_record.FOLDER).exists()
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_several_adapters_with_weights(tmp_path: Path, base: Path) -> None:
    one, two = adapter(tmp_path / "a"), adapter(tmp_path / "b", "fourierft", (Q,))
    merge(base, [one, two], tmp_path / "merged", weights=[0.5, -2.0])
    name = f"{Q}.weight"
    delta = 0.5 * delta_of(one, Q) - 2 * delta_of(two, Q)
    expected = (tensors_of(base)[name].float() + delta).to(torch.bfloat16)
    torch.testing.assert_close(tensors_of(tmp_path / "merged")[name], expected, rtol=2**-7, atol=1e-6)
    unmerge(tmp_path / "merged", tmp_path / "again")
    assert same(tensors_of(tmp_path / "again"), tensors_of(base))


def test_tied_weights_stay_tied(tmp_path: Path, base: Path) -> None:
    report = merge(base, [adapter(tmp_path / "a", "lora", (EMBED,))], tmp_path / "merged")
    after = tensors_of(tmp_path / "merged")
    assert torch.equal(after[f"{HEAD}.weight"], after[f"{EMBED}.weight"])
    assert report.tied == {f"{HEAD}.weight": f"{EMBED}.weight"}
    unmerge(tmp_path / "merged", tmp_path / "again")
    assert same(tensors_of(tmp_path / "again"), tensors_of(base))


def test_transposed_weights(tmp_path: Path) -> None:
    weight = gaussian(96, 130, dtype=torch.bfloat16)  # [I, O]
    base = write_folder(tmp_path / "base", {f"{Q}.weight": weight}, config={"model_type": "gpt2"})
    own = adapter(tmp_path / "a", "lora", (Q,), fan_in_fan_out=True)
    merge(base, [own], tmp_path / "merged")
    expected = (weight.float() + delta_of(own, Q).T).to(torch.bfloat16)
    torch.testing.assert_close(tensors_of(tmp_path / "merged")[f"{Q}.weight"], expected, rtol=2**-7, atol=1e-6)
    unmerge(tmp_path / "merged", tmp_path / "again")
    assert torch.equal(tensors_of(tmp_path / "again")[f"{Q}.weight"], weight)


def test_heads_and_biases_are_replaced_and_come_back(tmp_path: Path) -> None:
    tensors = llama_like() | {f"{Q}.bias": gaussian(130, dtype=torch.bfloat16)}
    base = write_folder(tmp_path / "base", tensors)
    bias, head, added = gaussian(130, seed=5), gaussian(300, 96, seed=6), gaussian(3, 96, seed=7)
    extra = {f"{Q}.base_layer.bias": bias, "lm_head.weight": head, "score.weight": added}
    own = adapter(tmp_path / "a", bias="lora_only", modules_to_save=("lm_head", "score"), extra=extra)
    report = merge(base, [own], tmp_path / "merged")
    after = tensors_of(tmp_path / "merged")
    assert torch.equal(after[f"{Q}.bias"], bias.bfloat16())
    assert torch.equal(after["lm_head.weight"], head.bfloat16())
    assert torch.equal(after["score.weight"], added)
    assert set(report.replaced) == {f"{Q}.bias", "lm_head.weight", "score.weight"}
    done = unmerge(tmp_path / "merged", tmp_path / "again")
    assert done.dropped == ("score.weight",)
    assert same(tensors_of(tmp_path / "again"), tensors_of(base))


@pytest.mark.parametrize(("inside", "outside"), [("", "bert."), ("bert.", "")])
def test_names_with_and_without_the_prefix_of_the_head(tmp_path: Path, inside: str, outside: str) -> None:
    layer = "encoder.layer.0.query"
    base = write_folder(tmp_path / "base", {f"{inside}{layer}.weight": gaussian(8, 8)})
    spec = AdapterSpec(METHODS["lora"], LoraConfig(r=1), ModuleTargets(("query",)))
    tensors = {"A": gaussian(1, 8), "B": gaussian(8, 1)}
    write_adapter(AdapterState(spec, {f"{outside}{layer}": tensors}), tmp_path / "a")
    report = merge(base, [tmp_path / "a"], tmp_path / "merged")
    assert list(report.layers) == [f"{inside}{layer}.weight"]


def test_an_adapter_of_another_base_lists_everything_and_writes_nothing(tmp_path: Path, base: Path) -> None:
    spec = AdapterSpec(METHODS["lora"], LoraConfig(r=1), ModuleTargets(("q_proj", "up_proj")))
    tensors = {"A": gaussian(1, 7), "B": gaussian(130, 1)}
    layers = {Q: tensors, "model.layers.9.q_proj": tensors, "model.layers.9.up_proj": tensors}
    write_adapter(AdapterState(spec, layers), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"the.*got \{'A': \(1, 7\), 'B': \(130, 1\)\} in the adapter;"):
        merge(base, [tmp_path / "a"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_twice_is_refused(tmp_path: Path, base: Path) -> None:
    own = adapter(tmp_path / "a")
    merge(base, [own], tmp_path / "merged")
    with pytest.raises(CheckpointError, match="expected a checkpoint without adapters, got one with some merged in"):
        merge(tmp_path / "merged", [own], tmp_path / "twice")
    head = adapter(tmp_path / "h", modules_to_save=("lm_head",), extra={"lm_head.weight": gaussian(300, 96)})
    with pytest.raises(CheckpointError, match="is replaced by two adapters"):
        merge(base, [head, head], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_quantised_bases_are_refused(tmp_path: Path) -> None:
    own = adapter(tmp_path / "a", layers=(Q,))
    int8 = write_folder(tmp_path / "int8", {f"{Q}.weight": torch.ones(130, 96, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is I8, expected F32, BF16, F16"):
        merge(int8, [own], tmp_path / "merged")
    vector = write_folder(tmp_path / "vector", {f"{Q}.weight": torch.ones(130)})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is \[130\], no matrix"):
        merge(vector, [own], tmp_path / "merged")
    marked = write_folder(tmp_path / "marked", llama_like(), config={"quantization_config": {"quant_method": "x"}})
    with pytest.raises(CheckpointError, match="marked: expected a plain checkpoint, got one quantised already"):
        merge(marked, [own], tmp_path / "merged")


def test_a_head_of_another_shape_and_numbers_out_of_range(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", llama_like(torch.float16))
    wide = adapter(tmp_path / "a", modules_to_save=("lm_head",), extra={"lm_head.weight": gaussian(3, 96)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[300, 96\], in the adapter \[3, 96\]"):
        merge(base, [wide], tmp_path / "merged")
    large = adapter(tmp_path / "b", modules_to_save=("lm_head",), extra={"lm_head.weight": torch.full((300, 96), 1e6)})
    with pytest.raises(NotMergeableError, match=r"lm_head\.weight: expected.*got one beyond the range of F16"):
        merge(base, [large], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_numbers_of_weights_and_adapters(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="--weights: expected one for each of 1 adapters, got 2"):
        merge(base, [adapter(tmp_path / "a")], tmp_path / "merged", weights=[1, 2])


def test_what_was_never_merged_cannot_be_unmerged(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UnmergeError, match="expected a folder that merge wrote, got one without a record of a merge"):
        unmerge(base, tmp_path / "again")


def test_a_changed_merge_is_refused_with_the_reason(tmp_path: Path, base: Path) -> None:
    merged = tmp_path / "merged"
    extra = {"lm_head.weight": gaussian(300, 96)}
    merge(base, [adapter(tmp_path / "a", modules_to_save=("lm_head",), extra=extra)], merged)
    folder = merged / merge_record.FOLDER
    record, data = folder / merge_record.RECORD_FILE, folder / merge_record.DATA_FILE
    text, raw = record.read_text(), data.read_bytes()

    def refused(error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            unmerge(merged, tmp_path / "again")
        assert not (tmp_path / "again").exists()
        record.write_text(text)
        data.write_bytes(raw)

    record.write_text(text.replace('"format_version": 2', '"format_version": 9'))
    refused(FormatVersionError, "expected format_version up to 2, got 9")
    for old, new in (
        ('"step": ', '"stop": '),
        ('"offset": ', '"offset": -'),
        ('"coding": "update"', '"coding": "xor"'),
    ):
        record.write_text(text.replace(old, new))
        refused(CheckpointError, r"expected the file that merge.*got a damaged one")
    record.write_text(text.replace(f'"{Q}.weight"', '"gone.weight"'))
    refused(UnmergeError, r"got one without gone\.weight, which was merged into")
    data.write_bytes(raw[:-1])
    refused(UnmergeError, "got a shorter one")
    data.unlink()
    refused(UnmergeError, "got what cannot be read")
    data.write_bytes(bytes(len(raw)))
    refused(UnmergeError, r"lm_head\.weight: expected what the merge wrote, got a tensor, or a record, that")
    for part in (["gone"], [Q, [130, 7]], [Q, [130, 96], [[9, 0, 130]]]):
        rows = json.loads(text)
        rows["tensors"][f"{Q}.weight"]["sources"] = [[0, *part]]
        record.write_text(json.dumps(rows))
        refused(UnmergeError, r"q_proj\.weight: expected what the merge wrote, got a tensor, or a record, that")
    rows = json.loads(text)
    rows["weights"] = [2.0]
    record.write_text(json.dumps(rows))
    refused(UnmergeError, "the base does not come out")
    file = merged / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}.weight"][0, 0] += 1
    save_file(tensors, file)
    refused(UnmergeError, r"q_proj\.weight: expected the weight as merge wrote it, got one that was changed")


def test_a_resized_vocabulary_is_said_wherever_the_configuration_has_it(tmp_path: Path) -> None:
    inner = {"vocab_size": 300, "tie_word_embeddings": True, "other": 300}
    config = {"model_type": "vision", "text_config": inner, "vision_config": {"vocab_size": 7}}
    base = write_folder(tmp_path / "base", llama_like(), config=config)
    tall, wide = gaussian(303, 96, seed=5), gaussian(303, 96, seed=6)
    extra = {"model.embed_tokens.weight": tall, "lm_head.weight": wide}
    own = adapter(tmp_path / "a", modules_to_save=("embed_tokens", "lm_head"), extra=extra)
    said = CliRunner().invoke(cli, ["merge", str(base), str(own), str(tmp_path / "merged"), "-q"]).stdout
    assert (
        "untied: lm_head.weight, model.embed_tokens.weight: different tensors now, tie_word_embeddings is fal" in said
    )
    assert "resized: model.embed_tokens.weight from 300 to 303 rows, and vocab_size" in said
    after = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert after["text_config"] == {"vocab_size": 303, "tie_word_embeddings": False, "other": 300}
    assert after["vision_config"] == {"vocab_size": 7}
    assert after["tie_word_embeddings"] is False
    unmerge(tmp_path / "merged", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    assert same(tensors_of(tmp_path / "again"), tensors_of(base))


def test_a_tied_output_layer_of_which_nobody_knows_the_name(tmp_path: Path) -> None:
    tensors = {name: own for name, own in llama_like().items() if name != "lm_head.weight"}
    base = write_folder(tmp_path / "base", tensors, config={"model_type": "own", "tie_word_embeddings": True})
    report = merge(base, [adapter(tmp_path / "a", "lora", (EMBED,))], tmp_path / "merged")
    assert report.tied == {"the output layer": "model.embed_tokens.weight"}
    extra = {"model.embed_tokens.weight": gaussian(300, 96)}
    own = adapter(tmp_path / "b", modules_to_save=("embed_tokens",), extra=extra)
    with pytest.raises(
        CheckpointError, match="is tied to an output layer that is not stored, and transformers does not"
    ):
        merge(base, [own], tmp_path / "again")


def test_records_of_the_first_version_are_read(tmp_path: Path, base: Path) -> None:
    merged, extra = tmp_path / "merged", {"lm_head.weight": gaussian(300, 96)}
    merge(base, [adapter(tmp_path / "a", modules_to_save=("lm_head",), extra=extra)], merged)
    folder = merged / merge_record.FOLDER
    rows, raw = (
        json.loads((folder / merge_record.RECORD_FILE).read_text()),
        (folder / merge_record.DATA_FILE).read_bytes(),
    )
    rows["format_version"] = 1
    for name, row in rows["tensors"].items():
        if row.pop("coding") != "update":  # it held the base as it was
            data = merge_record.compressed(tensors_of(base)[name])
            row |= {"offset": len(raw), "nbytes": len(data)}
            raw += data
        row["transposed"] = False
        del row["shape"]
    (folder / merge_record.RECORD_FILE).write_text(json.dumps(rows))
    (folder / merge_record.DATA_FILE).write_bytes(raw)
    unmerge(merged, tmp_path / "again")
    assert same(tensors_of(tmp_path / "again"), tensors_of(base))


def test_commands(tmp_path: Path, base: Path) -> None:
    own, merged, again = adapter(tmp_path / "a"), tmp_path / "merged", tmp_path / "again"
    run = CliRunner().invoke
    plan = run(cli, ["merge", str(base), str(own), str(merged), "--dry-run", "--json"])
    assert set(json.loads(plan.stdout)["tensors"]) == {f"{Q}.weight", f"{DOWN}.weight"}
    assert "Nothing was written" in run(cli, ["merge", str(base), str(own), str(merged), "--dry-run"]).stdout
    assert not merged.exists()
    done = run(cli, ["merge", str(base), str(own), str(own), str(merged), "--weights", "0.5,0.5", "-q"])
    assert "2 weights" in done.stdout
    assert "record for unmerge" in done.stdout
    assert "2 tensors would be restored" in run(cli, ["unmerge", str(merged), str(again), "--dry-run"]).stdout
    assert len(json.loads(run(cli, ["unmerge", str(merged), str(again), "--json", "-q"]).stdout)["restored"]) == 2
    assert same(tensors_of(again), tensors_of(base))
    assert run(cli, ["merge", str(base), str(own), str(merged), "--weights", "a"]).exit_code == 2


def test_a_part_of_a_pipeline_keeps_its_file_name(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", llama_like(), config={"_class_name": "UNet2DConditionModel"})
    (base / "model.safetensors").rename(base / "diffusion_pytorch_model.safetensors")
    merge(base, [adapter(tmp_path / "adapter")], tmp_path / "merged")
    unmerge(tmp_path / "merged", tmp_path / "back")
    for folder in ("merged", "back"):
        files = [file.name for file in (tmp_path / folder).glob("*.safetensors*")]
        assert files == ["diffusion_pytorch_model.safetensors"]
    assert same(tensors_of(base), tensors_of(tmp_path / "back"))


def test_every_tensor_is_reported_once(tmp_path: Path, base: Path) -> None:
    def watched(run: Callable[[Progress], object], folder: str) -> None:
        told: list[tuple[int, int, str]] = []
        run(lambda done, total, what: told.append((done, total, what)))
        names = {*read_index(tmp_path / folder).tensors}
        assert [done for done, _, _ in told] == list(range(1, len(names) + 1))
        assert {total for _, total, _ in told} == {len(names)}
        assert {what for _, _, what in told} == names

    own = adapter(tmp_path / "adapter", modules_to_save=("score",), extra={"score.weight": gaussian(3, 96)})
    watched(lambda say: merge(base, [own], tmp_path / "merged", progress=say), "merged")
    watched(lambda say: unmerge(tmp_path / "merged", tmp_path / "back", progress=say), "back")
    compress(base, tmp_path / "small", CompressOptions(Target("bits", 3.0)))
    watched(lambda say: decompress(tmp_path / "small", tmp_path / "plain", progress=say), "plain")
