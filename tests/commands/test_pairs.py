"""Models with an encoder and a decoder: calibrated stack after stack on pairs, and healed on the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from spectral_surgery.calibration.layer_moments import layer_moments, model_and_inputs
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.heal import heal
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.hf.models import load_any
from spectral_surgery.inputs.kinds import digest_of, kind_of
from spectral_surgery.inputs.pairs import decoder_tensors
from spectral_surgery.live.hooks import hooked
from spectral_surgery.text.settings import TextData
from spectral_surgery.training.settings import DistillSettings
from tests.commands.test_calibrate import write_text
from tests.commands.test_train import WORDS, save_tokenizer

BART = {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "max_position_embeddings": 64, "decoder_start_token_id": 0,
        "forced_eos_token_id": None}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", {"d_model": 64, "d_ff": 96, "d_kv": 32, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 3,
                  "decoder_start_token_id": 0}),
    "bart": ("Bart", {**BART, "encoder_layers": 2, "decoder_layers": 3}),
    "marian": ("Marian", {**BART, "encoder_layers": 3, "decoder_layers": 2}),
}  # fmt: skip
LAYERS = {"t5": 2 * 6 + 3 * 10, "bart": 2 * 6 + 3 * 10, "marian": 3 * 6 + 2 * 10}
FEW = DistillSettings(steps=20, eval_every=10, warmup_steps=2, learning_rate=0.05)


def save_model(kind: str, folder: Path, end: str = "ForConditionalGeneration") -> Path:
    import transformers

    stem, settings = KINDS[kind]
    name = f"{stem}MTModel" if stem == "Marian" and end else f"{stem}{end or 'Model'}"
    own = getattr(transformers, f"{stem}Config")(
        vocab_size=12, pad_token_id=0, bos_token_id=1, eos_token_id=1, **settings
    )
    torch.manual_seed(0)
    getattr(transformers, name)(own).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines, and the same words backwards."""
    file = write_text(tmp_path_factory.mktemp("pairs") / "pairs.tsv")
    lines = [f"{line}\t{' '.join(reversed(line.split()))}" for line in file.read_text().splitlines()]
    file.write_text("\n".join(lines))
    return file


def logits(folder: Path, seed: int = 9) -> torch.Tensor:
    model = load_any(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    ids, target = (torch.randint(2, 12, (20, length), generator=generator) for length in (8, 6))
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids, decoder_input_ids=target).logits
    return found


def test_moments_of_both_stacks_are_those_of_the_model(source: Path, pairs: Path) -> None:
    index, data = read_index(source), TextData(pairs, 24, 16)
    names = [name for name, info in index.tensors.items() if len(info.shape) == 2]
    lazy, inputs = model_and_inputs(source, index, data, exact=True)
    assert lazy.whole == source.parent.name.startswith("marian")  # whose positions are not stored
    assert [stack.prefix.partition(".")[0] for stack in lazy.chain.stacks] == ["encoder", "decoder"]
    found = {f"{turn.block}.{layer}": turn.moment for turn in layer_moments(lazy, inputs, names)
             for layer in turn.matrix.layers}  # fmt: skip
    model = load_any(source, "AutoModel", dtype=torch.float32)
    layers = {name: module for name, module in model.named_modules() if name in found}
    assert len(found) == len(layers) == LAYERS[source.parent.name[:-1]]
    wanted: dict[str, torch.Tensor] = {}

    def see(name: str, args: tuple[torch.Tensor, ...], _: object) -> None:
        x = args[0].double().flatten(0, -2)
        wanted[name] = wanted.get(name, 0) + x.T @ x

    with hooked(layers, see, before=True), torch.no_grad():
        for one in inputs:
            model(**{name: tensor[None] for name, tensor in one.read().items()})
    for name, moment in found.items():
        torch.testing.assert_close(moment.double(), wanted[name], rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("target", [Target("bits", 2.5), Target("density", 0.3)], ids=["bits", "density"])
def test_outputs_are_better_at_the_same_rate(tmp_path: Path, source: Path, pairs: Path, target: Target) -> None:
    options = CompressOptions(target, include=("*coder.[bl]*.*",), allocation="even")
    compress(source, tmp_path / "plain", options)
    report = compress(source, tmp_path / "pairs", options, calibrate=TextData(pairs, 64, 16))
    assert report.calibration is not None
    assert not report.calibration.left
    assert not report.calibration.whole
    assert report.manifest.options["calibration"].startswith("64 pairs of sha256:")
    original, errors = logits(source), []
    for name in ("plain", "pairs"):
        decompress(tmp_path / name, tmp_path / f"{name}-dense", verify=True)
        errors.append(float((logits(tmp_path / f"{name}-dense") - original).norm()))
    assert errors[1] < 0.85 * errors[0]


def test_bits_are_spread_over_both_stacks(tmp_path: Path, pairs: Path) -> None:
    source = save_model("t5", tmp_path / "model")
    report = compress(source, tmp_path / "out", CompressOptions(Target("bits", 3.0)), calibrate=TextData(pairs, 64, 16))
    assert report.manifest.report.bits_per_weight == pytest.approx(3.0, rel=0.02)
    rates = {name: record.report.bits_per_weight for name, record in report.manifest.tensors.items()}
    for side in ("encoder", "decoder"):
        assert len({round(rate, 1) for name, rate in rates.items() if name.startswith(side)}) > 2


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_healed_models_are_nearer(tmp_path: Path, source: Path, pairs: Path, blocks: bool) -> None:
    compress(source, tmp_path / "sparse", CompressOptions(Target("density", 0.3)))
    data = TextData(pairs, 0, 16, 16)
    if blocks and source.parent.name.startswith("marian"):
        with pytest.raises(CheckpointError, match="heal --blocks: expected a list of blocks whose parameters are"):
            heal(tmp_path / "sparse", source, tmp_path / "healed", data, FEW, blocks=True)
        return
    report = heal(tmp_path / "sparse", source, tmp_path / "healed", data, FEW, blocks=blocks)
    assert report.objective == "tokens"
    assert report.curve.best < 0.9 * report.curve.held_out[0][1]
    if blocks:
        assert len(report.blocks) == 5


def test_a_model_without_a_head_is_healed_by_its_states(tmp_path: Path, pairs: Path) -> None:
    source = save_model("t5", tmp_path / "model", "")
    compress(source, tmp_path / "sparse", CompressOptions(Target("density", 0.3)))
    report = heal(tmp_path / "sparse", source, tmp_path / "healed", TextData(pairs, 0, 16, 16), FEW)
    assert report.objective == "embeddings"
    assert report.curve.best < report.curve.held_out[0][1]


def read(file: Path, text: str, folder: Path) -> list[list[str]]:
    """Source and target of each pair, as words."""
    file.write_text(text)
    _, inputs = model_and_inputs(folder, read_index(folder), TextData(file))
    words = ["", "", *WORDS]
    return [[" ".join(words[token] for token in one.read()[name] if token > 1) for name in
             ("input_ids", "decoder_input_ids")] for one in inputs]  # fmt: skip


def test_files_of_pairs(tmp_path: Path) -> None:
    folder = save_model("t5", tmp_path / "model")
    first, second, third = WORDS[:3]
    wanted = [[first, second]]  # a target is read without its last token, and the tokenizer adds none at the end
    target = f"{second} {third}"
    assert read(tmp_path / "a.tsv", f"{first}\t{target}\n", folder) == wanted
    assert read(tmp_path / "a.jsonl", f'{{"id": 3, "en": "{first}", "de": "{target}"}}\n', folder) == wanted
    assert read(tmp_path / "a.csv", f"source,target\n{first},{target}\n", folder) == wanted
    assert read(tmp_path / "a.txt", f"{target}\n{first}\n", folder) == [[target, second], [first, ""]]
    with pytest.raises(ConfigError, match=r"b\.txt: text 2: expected a source, one tab and a target, .* got 0 tabs"):
        read(tmp_path / "b.txt", f"{first}\t{second}\n{first}\n", folder)
    with pytest.raises(ConfigError, match=r"c\.tsv: expected pairs of a source and a target that the model reads"):
        read(tmp_path / "c.tsv", f"{first}\t \n", folder)


def test_what_a_decoder_begins_with() -> None:
    from types import SimpleNamespace

    def begun(**settings: int) -> list[int]:
        return decoder_tensors([5, 6, 7], SimpleNamespace(**settings))["decoder_input_ids"].tolist()

    assert begun(decoder_start_token_id=0, bos_token_id=2) == [0, 5, 6]
    assert begun(bos_token_id=2) == [2, 5, 6]
    assert begun() == [7, 5, 6]  # the token of a language at the end is the one that begins


def test_kinds_go_by_the_model(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a")
    encodes = {"is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]}
    assert kind_of(file, encodes).name == "pairs"
    assert kind_of(file, {"is_encoder_decoder": True, "architectures": ["T5EncoderModel"]}).name == "text"
    assert kind_of(file, {}).name == "text"
    assert digest_of(TextData(file), {}).startswith("512 x 256 tokens of sha256:")
    with pytest.raises(ConfigError, match="expected text, or a folder of images or sound, got a folder with none"):
        kind_of(tmp_path, {})
