"""Folders of images: every kind of image model is calibrated and healed on them, and every fault is named."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from PIL import Image

from spectral_surgery.calibration.layer_moments import model_and_inputs
from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress, plan_compression
from spectral_surgery.commands.compress.spread_bits import measure_shares
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.heal import heal
from spectral_surgery.commands.settings import Healing
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.hf.models import load_any
from spectral_surgery.inputs.folders import media_files
from spectral_surgery.inputs.images import SUFFIXES, read_image
from spectral_surgery.inputs.model_input import ModelInput, padded
from spectral_surgery.live.stacks import entry_of
from spectral_surgery.text.settings import TextData
from spectral_surgery.training.settings import DistillSettings
from tests.zoo.entry import stir

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
EYES = {**SIZES, "image_size": 32, "patch_size": 8}
WORDS = {**SIZES, "vocab_size": 32, "max_position_embeddings": 16}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
SAM_EYES = {"hidden_size": 64, "mlp_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
            "patch_size": 16, "output_channels": 32, "num_pos_feats": 16, "global_attn_indexes": [1],
            "window_size": 2}  # fmt: skip
SAM = {"vision_config": SAM_EYES,
       "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
       "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2,
                               "iou_head_hidden_dim": 16}}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTImageProcessor", EYES),
    "dinov2": ("Dinov2Model", "BitImageProcessor", EYES),
    "clip": ("CLIPModel", "CLIPImageProcessor", {"text_config": WORDS, "vision_config": EYES, "projection_dim": 32}),
    "siglip": ("SiglipModel", "SiglipImageProcessor", {"text_config": WORDS, "vision_config": EYES}),
    "convnext": ("ConvNextForImageClassification", "ConvNextImageProcessor",
                 {"image_size": 32, "hidden_sizes": [32, 64], "depths": [2, 1], "num_stages": 2}),
    "swin": ("SwinForImageClassification", "ViTImageProcessor", SWIN),
    "sam": ("SamModel", "SamImageProcessor", SAM),
}  # fmt: skip
CUT = {"SamImageProcessor": {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}},
       "BitImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": 32},
       "CLIPImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": 32},
       "ConvNextImageProcessor": {"size": {"shortest_edge": 32}}}  # fmt: skip
OPTIONS = CompressOptions(Target("bits", 2.5), allocation="even")


def save_model(kind: str, folder: Path) -> Path:
    import transformers

    name, processor, settings = MODELS[kind]
    own = getattr(transformers, name)
    torch.manual_seed(0)
    model = own(own.config_class(**settings))
    stir(model)
    model.save_pretrained(folder)
    size = CUT.get(processor, {"size": {"height": 32, "width": 32}})
    getattr(transformers, processor)(**size).save_pretrained(folder)
    return folder


def picture(seed: int) -> Any:
    """Soft coloured stripes."""
    torch.manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, 40), torch.linspace(0, 1, 48), indexing="ij")
    turned = x[..., None] * torch.randn(3) * 9 + y[..., None] * torch.randn(3) * 9
    return Image.fromarray(((turned.sin() + 1) * 127.5).byte().numpy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("images")
    for number in range(24):
        place = made / ("left" if number % 2 else "right")
        place.mkdir(exist_ok=True)
        picture(number).save(place / f"{number}.png")
    return made


def outputs(source: Path, inputs: list[ModelInput]) -> torch.Tensor:
    entry = entry_of(load_any(source, dtype=torch.float32), {"pixel_values"})[1]
    with torch.inference_mode():
        found = entry(**padded(inputs), output_hidden_states=True)
    states = getattr(found, "vision_hidden_states", None) or found.hidden_states
    last: torch.Tensor = states[-1]
    return last


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_better_at_the_same_rate(tmp_path: Path, kind: str, folder: Path) -> None:
    source = save_model(kind, tmp_path / "model")
    _, inputs = model_and_inputs(source, read_index(source), TextData(folder, 24))
    options = replace(OPTIONS, include=("*pwconv*" if kind == "convnext" else "*layer*.[01].*",))
    compress(source, tmp_path / "plain", options)
    report = compress(source, tmp_path / "seen", options, calibrate=TextData(folder, 24))
    assert report.calibration is not None
    assert not report.calibration.whole
    assert len(report.calibration.layers) >= 2
    assert not any("text_model" in layer.name for layer in report.calibration.layers)  # what no image comes to
    assert report.manifest.options["calibration"].startswith("24 images of sha256:")
    original, errors = outputs(source, inputs), []
    for name in ("plain", "seen"):
        decompress(tmp_path / name, tmp_path / f"{name}-dense", verify=True)
        errors.append(float((outputs(tmp_path / f"{name}-dense", inputs) - original).norm()))
    assert errors[1] < 0.95 * errors[0]


def test_what_enters_the_blocks_gets_bits_too(tmp_path: Path, folder: Path) -> None:
    source = save_model("vit", tmp_path / "model")
    index, plan = plan_compression(source, CompressOptions(Target("bits", 3.0), min_weights=512))
    shares = measure_shares(source, index, plan, TextData(folder, 24))
    entering = [name for name in shares if "embeddings" in name]
    assert len(entering) == 2  # patches, and positions
    layers = [share.cost for name, share in shares.items() if name not in entering]
    assert all(shares[name].cost > sum(layers) / len(layers) for name in entering)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_healed_models_are_nearer(tmp_path: Path, kind: str, folder: Path) -> None:
    source = save_model(kind, tmp_path / "model")
    compress(source, tmp_path / "sparse", CompressOptions(Target("density", 0.3)))
    settings = DistillSettings(steps=12, eval_every=6, warmup_steps=2)
    report = heal(tmp_path / "sparse", source, tmp_path / "healed", TextData(folder, batch_size=8), settings)
    assert report.objective == {"vit": "classes", "clip": "embeddings"}[kind]
    assert report.curve.best < 0.9 * report.curve.held_out[0][1]
    assert all("text" in name for name in report.untrained)


def test_files_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = save_model("vit", tmp_path / "model")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with pytest.raises(ConfigError, match="pictures: expected text, or a folder of images or sound, got a folder"):
        compress(source, tmp_path / "out", OPTIONS, calibrate=TextData(pictures))
    for number in range(3):
        picture(number).save(pictures / f"{number}.png")
    whole = (pictures / "0.png").read_bytes()
    (pictures / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"half\.png: expected an image, got a broken one .* --unreadable skip"):
        compress(source, tmp_path / "out", OPTIONS, calibrate=TextData(pictures))
    (pictures / "text.jpg").write_text("no image")
    with caplog.at_level(logging.WARNING, "spectral_surgery"):
        _, inputs = model_and_inputs(source, read_index(source), TextData(pictures, unreadable="skip"))
    assert len(inputs) == 3
    assert sorted(name for name in ("half.png", "text.jpg") if name in caplog.text) == ["half.png", "text.jpg"]
    assert "text.jpg: expected an image, got no file of a kind that Pillow reads. It is left out." in caplog.text
    arguments = ["compress", str(source), str(tmp_path / "out"), "--bits", "3", "--calibrate", str(pictures)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 1
    assert "expected an image" in done.output + str(done.exception)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(cli, [*arguments, "--unreadable", "skip", "--overwrite", "-q"])
    assert done.exit_code == 0, done.output


def test_a_model_that_sees_nothing_says_so(tmp_path: Path, folder: Path, bert: Path) -> None:
    with pytest.raises(ConfigError, match=r"images\d*: expected text for BertModel, got images\."):
        compress(bert, tmp_path / "out", OPTIONS, calibrate=TextData(folder))
    source = save_model("vit", tmp_path / "model")
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="has no image processor that can be loaded"):
        compress(source, tmp_path / "out", OPTIONS, calibrate=TextData(folder))


@pytest.mark.parametrize(("kind", "takes"), [("vit", "a folder of images"), ("convnext", "a folder of images")])
def test_a_model_that_reads_nothing_says_what_it_takes(tmp_path: Path, kind: str, takes: str) -> None:
    source, text = save_model(kind, tmp_path / "model"), tmp_path / "notes.txt"
    text.write_text("words")
    with pytest.raises(ConfigError, match=rf"notes\.txt: expected {takes} for \w+, got text\."):
        compress(source, tmp_path / "out", OPTIONS, calibrate=TextData(text))
    with pytest.raises(CheckpointError, match=r"model: cannot be loaded by Auto.*: it has no class of this kind for"):
        compress(source, tmp_path / "out", OPTIONS, heal=Healing(TextData(text)))
    assert not (tmp_path / "out").exists()


def test_images_of_other_modes(tmp_path: Path) -> None:
    for mode in ("L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "F"):
        suffix = "tiff" if mode in ("CMYK", "YCbCr", "F") else "png"
        picture(0).convert("RGBA" if mode == "LA" else mode if mode != "F" else "L").convert(mode).save(
            tmp_path / f"{mode}.{suffix}"
        )
        image = read_image(tmp_path / f"{mode}.{suffix}")
        assert (image.mode, image.size) == ("RGB", (48, 40))
    bright = torch.full((4, 4), 0xFF00, dtype=torch.int32).numpy().astype("uint16")
    Image.fromarray(bright).save(tmp_path / "16.png")
    assert read_image(tmp_path / "16.png").getpixel((0, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "L.png", "L").mode == "L"
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    picture(0).save(tmp_path / "turned.jpg", exif=turned)
    assert read_image(tmp_path / "turned.jpg").size == (40, 48)


def test_what_is_said_of_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(0).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("stripes\n")
    (tmp_path / "cats").mkdir()
    picture(1).save(tmp_path / "cats" / "c.png")
    found = {file.path.name: (file.text, file.label) for file in media_files(tmp_path, SUFFIXES)}
    assert found == {"a.png": ("stripes", ""), "b.png": ("", ""), "c.png": ("", "cats")}
    (tmp_path / "metadata.csv").write_text("file_name,text,label\nb.png,some lines,3\n")
    (only,) = media_files(tmp_path, SUFFIXES)
    assert (only.path.name, only.text, only.label) == ("b.png", "some lines", "3")
    (tmp_path / "metadata.csv").write_text("file_name\ngone.png\n")
    with pytest.raises(ConfigError, match=r"gone\.png: no such file\. The metadata of .* names it"):
        media_files(tmp_path, SUFFIXES)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"text": "nothing"}\n')
    with pytest.raises(ConfigError, match=r"metadata\.jsonl: row 1: expected a file_name, got none"):
        media_files(tmp_path, SUFFIXES)
