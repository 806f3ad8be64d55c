"""Models that see, and encoder-decoders: made and trained here, compressed with and without data, and healed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.case import Row, require
from benchmarks.judged import verified
from spectral_surgery import CompressOptions, DistillSettings, Healing, Target, TextData, read_index
from spectral_surgery.errors import required
from spectral_surgery.hf.models import load_any
from spectral_surgery.inputs.kind import Reading
from spectral_surgery.inputs.kinds import kind_of
from spectral_surgery.inputs.model_input import ModelInput, padded

BITS = 3.0
SECONDS = {False: 60.0, True: 20.0}  # of this process, that a model is trained for
HEALING = {False: 100, True: 10}  # steps
BATCH, EXAMPLES, HELD_OUT = 32, 1024, 128
CLASSES, SIDE = 8, 32
WORDS = 60


@dataclass(frozen=True)
class Subject:
    """A model, and what it learns.

    Attributes:
        name: of the row.
        make: (a folder) writes a configured model there, and what it reads with.
        write: (a folder, a count, a seed) writes data, and gives the file or folder of it.
        aim: the error after calibrating over that without data is at most that.
        heals: whether healing is measured too.
    """

    name: str
    make: Callable[[Path], None]
    write: Callable[[Path, int, int], Path]
    aim: float
    heals: bool


def run(quick: bool) -> list[Row]:
    """Errors of outputs on data that no model was trained or calibrated on."""
    with tempfile.TemporaryDirectory() as scratch:
        return [row for subject in SUBJECTS for row in _rows(subject, Path(scratch) / subject.name, quick)]


def _rows(subject: Subject, scratch: Path, quick: bool) -> list[Row]:
    scratch.mkdir()
    source, data = scratch / "model", subject.write(scratch / "data", EXAMPLES, 0)
    subject.make(source)
    loss, steps = _trained(source, _inputs(source, data), SECONDS[quick])
    judged = _inputs(source, subject.write(scratch / "held-out", HELD_OUT, 1))
    wanted, options, found = _outputs(source, judged), CompressOptions(Target("bits", BITS)), dict[str, float]()
    ways: dict[str, tuple[TextData | None, Healing | None]] = {
        "data-free": (None, None),
        "calibrated": (TextData(data), None),
    }
    if subject.heals:
        healing = Healing(TextData(data), DistillSettings(steps=HEALING[quick], eval_every=HEALING[quick] // 2))
        ways["calibrated, healed"] = TextData(data), healing
    for number, (way, (calibrate, heal)) in enumerate(ways.items()):
        report = verified(source, scratch / str(number), options, calibrate=calibrate, heal=heal)
        bits = report.manifest.report.bits_per_weight
        require(abs(bits - BITS) < 0.03 * BITS, f"{subject.name}, {way}: {bits:.3f} bits a weight")
        error = (_outputs(scratch / str(number), judged) - wanted).norm() / wanted.norm()
        found[way] = float(error)
    first = found["data-free"]
    return [
        {
            "model": subject.name,
            "trained": f"{steps} steps, loss {loss:.3f}",
            "way": way,
            "output error": error,
            "/ data-free": error / first,
            "target": "" if way == "data-free" else f"<= {subject.aim:g}",
            "met": "" if way == "data-free" else error <= subject.aim * first,
        }
        for way, error in found.items()
    ]


def _inputs(source: Path, data: Path) -> list[ModelInput]:
    """All of the data, as the model reads it, in memory; labels of images with them."""
    config = read_index(source).config
    kind = kind_of(data, config)
    reading = Reading(TextData(data), source, config, load_any(source), 64, causal=False)
    items = kind.items(reading)
    inputs = [ModelInput.of(one.read(), one.padding) for one in kind.inputs(reading, items, 0)]
    labels = [torch.tensor(int(getattr(item, "label", "") or -1)) for item in items]
    return [ModelInput.of(one.read() | {"labels": label}) for one, label in zip(inputs, labels, strict=True)]


def _trained(source: Path, inputs: Sequence[ModelInput], seconds: float) -> tuple[float, int]:
    """Train a model in place for some seconds of this process: its last loss, and the steps."""
    model, began, steps, loss = load_any(source).train(), time.process_time(), 0, torch.zeros(())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    while time.process_time() - began < seconds:
        picked = torch.randint(len(inputs), (BATCH,), generator=generator).tolist()
        loss = _loss(model, padded([inputs[i] for i in picked]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    model.save_pretrained(source)
    return float(loss), steps


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    labels = batch.pop("labels")
    logits = model(**batch).logits
    if "decoder_input_ids" not in batch:
        return functional.cross_entropy(logits, labels)
    read, mask = batch["decoder_input_ids"], batch["decoder_attention_mask"][:, 1:].bool()
    return functional.cross_entropy(logits[:, :-1][mask], read[:, 1:][mask])


@torch.inference_mode()
def _outputs(folder: Path, inputs: Sequence[ModelInput]) -> Tensor:
    """Logits of all inputs, one after the other; where there was no padding."""
    model, found = load_any(folder, dtype=torch.float32), []
    if getattr(model, "hf_quantizer", None) is not None:
        model.dequantize()  # what is lost in the weights, and not by computing with them compressed
    for start in range(0, len(inputs), BATCH):
        batch = padded(inputs[start : start + BATCH])
        batch.pop("labels")
        logits = model(**batch).logits
        mask = batch.get("decoder_attention_mask")
        found.append((logits if mask is None else logits[mask.bool()]).flatten())
    return torch.cat(found)


def _write_images(folder: Path, count: int, seed: int) -> Path:
    """Stripes of eight directions in noise, in subfolders by direction."""
    image: Any = required("PIL.Image", "write images")
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIDE) / SIDE, torch.arange(SIDE) / SIDE, indexing="ij")
    for number in range(count):
        label = number % CLASSES
        angle = torch.tensor(torch.pi * label / CLASSES)
        wave, shift = 12 + 20 * torch.rand(1, generator=generator), 6 * torch.rand(1, generator=generator)
        stripes = torch.sin(wave * (x * angle.cos() + y * angle.sin()) + shift)
        colour = torch.rand(3, generator=generator)
        noisy = stripes[..., None] * colour + 0.7 * torch.randn(SIDE, SIDE, 3, generator=generator)
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        pixels = ((noisy.clamp(-2, 2) + 2) * 63.75).byte().numpy()
        image.fromarray(pixels).save(folder / str(label) / f"{number}.png")
    return folder


def _write_pairs(folder: Path, count: int, seed: int) -> Path:
    """Words, and the same backwards."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    lines = []
    for _ in range(count):
        length = int(torch.randint(5, 9, (), generator=generator))
        words = [f"w{word}" for word in torch.randint(WORDS, (length,), generator=generator).tolist()]
        lines.append(f"{' '.join(words)}\t{' '.join(reversed(words))} end")
    (folder / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "pairs.tsv"


def _make_vit(folder: Path) -> None:
    transformers = required("transformers", "make models")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=SIDE, patch_size=4, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_labels=CLASSES, hidden_dropout_prob=0.0,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def _make_t5(folder: Path) -> None:
    transformers = required("transformers", "make models")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=128, d_ff=256, d_kv=32, num_layers=3, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    _save_words(folder)


def _make_bart(folder: Path) -> None:
    transformers = required("transformers", "make models")
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             (("layers", 3), ("ffn_dim", 256), ("attention_heads", 4))}  # fmt: skip
    config = transformers.BartConfig(
        vocab_size=64, d_model=128, max_position_embeddings=64, dropout=0.0, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None, **sizes,
    )  # fmt: skip
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    _save_words(folder)


def _save_words(folder: Path) -> None:
    """A tokenizer of the words of the pairs."""
    tokenizers, transformers = required("tokenizers", "make models"), required("transformers", "make models")
    words = ["[PAD]", "end", *(f"w{number}" for number in range(WORDS)), "[UNK]"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")  # noqa: S106
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "[PAD]", "eos_token": "end", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **named).save_pretrained(folder)


SUBJECTS = (
    Subject("ViT", _make_vit, _write_images, 0.6, heals=False),
    Subject("T5", _make_t5, _write_pairs, 0.7, heals=True),
    Subject("BART", _make_bart, _write_pairs, 0.7, heals=True),
)
