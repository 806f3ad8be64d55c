"""JSONL of chats, with images and without: read through the chat template, calibrated on, healed on and judged on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from spectral_surgery.calibration.layer_moments import layer_moments, model_and_inputs
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.eval import evaluate
from spectral_surgery.commands.heal import heal
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.hf.models import load_any
from spectral_surgery.inputs import chats as module
from spectral_surgery.inputs.kinds import kind_of
from spectral_surgery.inputs.model_input import NOT_JUDGED, ModelInput, equal_shapes, padded
from spectral_surgery.live.hooks import hooked
from spectral_surgery.text.settings import EvalData, TextData
from spectral_surgery.training.settings import DistillSettings
from tests.commands import test_calibrate
from tests.commands.test_images import picture
from tests.commands.test_train import WORDS
from tests.zoo.entry import stir

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE {% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %} [END] {% endfor %}"
)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
EYES = {**SIZES, "image_size": 32, "patch_size": 8}
ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
MARKS = {
    "llava": ["<image>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<end_of_utterance>"],
    "qwen2_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
}
SHOWN = {"llava": "<image>", "idefics3": "<image>", "qwen2_vl": "<|vision_start|> <|image_pad|> <|vision_end|>"}


def tokenizer_of(marks: Sequence[str], image: str = "") -> Any:
    import tokenizers
    import transformers

    words = ["[PAD]", "[END]", "[UNK]", *WORDS, "user", "assistant", ":", *marks]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(marks))
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]"
    )
    made.chat_template = TEMPLATE.replace("IMAGE", image)
    return made


class Patches:
    """What the processor of Qwen2-VL does, which transformers cannot make without torchvision."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        self.images, self.tokenizer, self.chat_template = images, tokenizer, ""

    def apply_chat_template(self, messages: Any, tokenize: bool) -> Any:
        return self.tokenizer.apply_chat_template(messages, tokenize=tokenize)

    def __call__(self, text: list[str], images: list[list[Any]], **named: Any) -> dict[str, torch.Tensor]:
        made = dict(self.images(images[0], return_tensors="pt"))
        for size in made["image_grid_thw"].prod(-1).tolist():
            text = [text[0].replace("<|image_pad|>", " ".join(["<image>"] * (size // 4)), 1)]
        made |= dict(self.tokenizer([text[0].replace("<image>", "<|image_pad|>")], **named))
        image = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return made | {"mm_token_type_ids": (made["input_ids"] == image).long()}


def processor_of(kind: str) -> Any:
    import transformers

    tokenizer = tokenizer_of(MARKS[kind], SHOWN[kind])
    if kind == "llava":
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        made = transformers.LlavaProcessor(
            images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    elif kind == "idefics3":
        square = {"longest_edge": 32}
        images = transformers.Idefics3ImageProcessor(size=square, max_image_size=square, do_image_splitting=False)
        made = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)
    else:
        made = Patches(transformers.Qwen2VLImageProcessor(min_pixels=64, max_pixels=1024, patch_size=8), tokenizer)
    made.chat_template = tokenizer.chat_template
    return made


def save_model(kind: str, folder: Path) -> Path:
    """A model that sees and writes, with its processor; the one of Qwen2-VL cannot be read without torchvision."""
    import transformers

    processor = processor_of(kind)
    ids = {mark: processor.tokenizer.convert_tokens_to_ids(mark) for mark in MARKS[kind]}
    text = {**SIZES, "vocab_size": len(processor.tokenizer), "num_key_value_heads": 2, "pad_token_id": 0}
    named: dict[str, Any] = {"image_token_id": next(iter(ids.values()))}
    if kind == "llava":
        named = {"image_token_index": ids["<image>"], "text_config": {"model_type": "llama", **text},
                 "vision_config": {"model_type": "clip_vision_model", **EYES, "projection_dim": 64},
                 "vision_feature_layer": -1, "image_seq_length": 16}  # fmt: skip
    elif kind == "idefics3":
        named |= {"text_config": {"model_type": "llama", **text}, "vision_config": EYES, "scale_factor": 2}
    else:
        eyes = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
        named |= {"text_config": {**text, "rope_parameters": ROPE}, "vision_config": eyes,
                  "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
                  "video_token_id": ids["<|video_pad|>"]}  # fmt: skip
    stem = {"llava": "Llava", "idefics3": "Idefics3", "qwen2_vl": "Qwen2VL"}[kind]
    own = getattr(transformers, f"{stem}ForConditionalGeneration")
    torch.manual_seed(0)
    model = own(getattr(transformers, f"{stem}Config")(**named))
    stir(model)
    model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    if kind != "qwen2_vl":
        processor.save_pretrained(folder)
    return folder


def said(generator: random.Random, count: int) -> str:
    return " ".join(generator.choices(WORDS, k=count))


def write(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats about an image each."""
    folder, draw, rows = tmp_path_factory.mktemp("shown"), random.Random(0), []
    for number in range(24):
        picture(number).save(folder / f"{number}.png")
        question, answer = said(draw, 3 + number % 2), said(draw, 4)
        rows.append({"prompt": question, "completion": answer, "image": f"{number}.png"})
    return write(folder / "shown.jsonl", rows)


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need torchvision to be read, as they are made."""
    found = module.load_processor

    def load(folder: Path, *, trust_remote_code: bool = False) -> Any:
        qwen = "Qwen2VL" in str(read_index(folder).config["architectures"])
        return processor_of("qwen2_vl") if qwen else found(folder, trust_remote_code=trust_remote_code)

    monkeypatch.setattr(module, "load_processor", load)


@pytest.fixture(scope="module", params=list(MARKS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    import transformers

    tokenizer, folder = tokenizer_of([]), tmp_path / "llama"
    torch.manual_seed(0)
    own = transformers.LlamaConfig(**SIZES, vocab_size=len(tokenizer), pad_token_id=0)
    transformers.LlamaForCausalLM(own).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read(folder: Path, file: Path) -> list[ModelInput]:
    return model_and_inputs(folder, read_index(folder), TextData(file), exact=True)[1]


def words(folder: Path, file: Path) -> list[str]:
    from spectral_surgery.hf.models import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return [tokenizer.decode(one.read()["input_ids"]) for one in read(folder, file)]


CHAT = [{"role": "user", "content": "red cat"}, {"role": "assistant", "content": "blue dog"}]
WRITTEN = "user : red cat [END] assistant : blue dog [END]"


def test_chats_are_read_through_the_template(llama: Path, tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:]}, "",
            {"prompt": "red cat", "completion": "blue dog"}]  # fmt: skip
    file = write(tmp_path / "chats.jsonl", rows)
    assert kind_of(file, read_index(llama).config).name == "chats"
    assert words(llama, file) == [WRITTEN] * 3
    (one, *_) = read(llama, file)
    ids = one.read()["input_ids"].tolist()
    assert list(one.labels) == [*ids[1:], NOT_JUDGED]
    short = model_and_inputs(llama, read_index(llama), TextData(file, seq_length=4))[1]
    assert [one.read()["input_ids"].tolist() for one in short] == [ids[:4]] * 3


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    plain = test_calibrate.save_model("llama", tmp_path / "model")
    file = write(tmp_path / "a.jsonl", [{"prompt": "red cat ", "completion": "blue dog"}])
    assert words(plain, file) == ["red cat blue dog"]
    file = write(tmp_path / "b.jsonl", [{"messages": CHAT}])
    with pytest.raises(ConfigError, match=r"model: expected a tokenizer with a chat template for .*b\.jsonl, got one"):
        compress(plain, tmp_path / "out", CompressOptions(Target("bits", 3.0)), calibrate=TextData(file))
    assert not (tmp_path / "out").exists()


def test_lines_that_are_no_chats(llama: Path, tmp_path: Path) -> None:
    for number, row in enumerate(
        [{"text": "red"}, {"messages": [{"role": "user"}]}, {"messages": []}, {"messages": 3}]
    ):
        file = write(tmp_path / f"{number}.jsonl", [{"messages": CHAT}, row])
        with pytest.raises(ConfigError, match=r"\d\.jsonl: line 2: expected messages with a role and a content each"):
            read(llama, file)
    with pytest.raises(ConfigError, match="expected a JSON object in UTF-8 on every line"):
        read(llama, write(tmp_path / "b.jsonl", [{"messages": CHAT}, "{"]))
    with pytest.raises(ConfigError, match=r"line 1: expected messages .* got messages\. Mend or remove"):
        read(llama, write(tmp_path / "c.jsonl", [{"messages": "red"}]))
    picture(0).save(tmp_path / "0.png")
    mixed = write(tmp_path / "d.jsonl", [{"prompt": "red", "image": "0.png"}, {"prompt": "red"}])
    with pytest.raises(ConfigError, match="line 2: expected an image, as on other lines, got none"):
        read(save_model("llava", tmp_path / "llava"), mixed)
    refusing = llama / "chat_template.jinja"
    refusing.write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        ConfigError, match=r"expected chats that the template of llama takes, got roles must alternate\."
    ):
        read(llama, write(tmp_path / "e.jsonl", [{"messages": CHAT}]))


def test_a_model_is_calibrated_healed_and_judged_on_chats(llama: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = [{"prompt": said(draw, 4), "completion": said(draw, 2 + number % 3)} for number in range(48)]
    file = write(tmp_path / "chats.jsonl", rows)
    options, found = CompressOptions(Target("bits", 2.0)), {}
    report = compress(llama, tmp_path / "calibrated", options, calibrate=TextData(file))
    assert report.manifest.options["calibration"].startswith("512 chats of sha256:")
    compress(llama, tmp_path / "plain", options)
    for name in ("plain", "calibrated"):
        found[name] = evaluate(llama, tmp_path / name, EvalData(file)).measures
        assert found[name].keys() == {"loss_a", "loss_b", "kl", "same_top"}
    assert found["calibrated"]["kl"] < 0.8 * found["plain"]["kl"]
    settings = DistillSettings(steps=8, eval_every=4, warmup_steps=1)
    healed = heal(tmp_path / "plain", llama, tmp_path / "healed", TextData(file, batch_size=8), settings)
    assert healed.curve.best < healed.curve.held_out[0][1]


def test_images_are_shown_where_the_template_has_them(tmp_path: Path) -> None:
    source = save_model("llava", tmp_path / "model")
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    part = {"type": "image"}
    rows = [
        {"prompt": "red cat", "completion": "dog", "image": "0.png"},
        {"prompt": "red cat", "completion": "dog", "images": ["0.png"]},
        {"messages": [{"role": "user", "content": "red cat"}, {"role": "assistant", "content": "dog"}],
         "image": "0.png"},
        {"messages": [{"role": "user", "content": [part | {"path": "0.png"}, {"type": "text", "text": "red cat"}]},
                      {"role": "assistant", "content": "dog"}]},
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "red cat"}]},
                      {"role": "assistant", "content": "dog"}], "images": ["0.png"]},
    ]  # fmt: skip
    shown = " ".join(["<image>"] * 16)
    assert (
        words(source, write(tmp_path / "a.jsonl", rows)) == [f"user : {shown} red cat [END] assistant : dog [END]"] * 5
    )
    (one, *_) = read(source, tmp_path / "a.jsonl")
    assert {name: tensor.shape[0] for name, tensor in one.read().items()} == {
        "input_ids": 25, "attention_mask": 25, "pixel_values": 1}  # fmt: skip
    image = one.read()["input_ids"][2].item()
    assert image not in one.labels
    assert one.labels.count(NOT_JUDGED) == 17
    two = write(tmp_path / "b.jsonl", [{"prompt": "red", "completion": "dog", "images": ["0.png", "1.png"]}])
    assert words(source, two) == [f"user : {shown} {shown} red [END] assistant : dog [END]"]
    wrong = [{"messages": [{"role": "user", "content": [part, {"type": "text", "text": "red"}]}],
              "images": ["0.png", "1.png"]}]  # fmt: skip
    with pytest.raises(ConfigError, match=r"c\.jsonl: expected as many images as the chat shows, got 2"):
        read(source, write(tmp_path / "c.jsonl", wrong))
    gone = write(tmp_path / "d.jsonl", [{"prompt": "red", "image": "gone.png"}])
    with pytest.raises(ConfigError, match=r"gone\.png: expected an image, got .* --unreadable skip"):
        read(source, gone)
    (source / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="expected a tokenizer with a chat template"):
        read(source, tmp_path / "a.jsonl")


def test_a_model_that_sees_nothing_says_so(llama: Path, shown: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shown\.jsonl: expected text for Llama\w+, got chats with images\."):
        read(llama, shown)
    source = save_model("llava", tmp_path / "model")
    (source / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="model: has no processor of texts with images"):
        read(source, shown)


def test_images_alone_are_for_the_part_that_sees(shown: Path, tmp_path: Path) -> None:
    source, photos = save_model("llava", tmp_path / "model"), shown.parent
    (photos / "folder").mkdir(exist_ok=True)
    for number in range(16):
        picture(number).save(photos / "folder" / f"{number}.png")
    options, data = CompressOptions(Target("bits", 2.0)), TextData(photos / "folder", batch_size=6)
    compress(source, tmp_path / "plain", options)
    settings = DistillSettings(steps=6, eval_every=3, warmup_steps=1)
    healed = heal(tmp_path / "plain", source, tmp_path / "healed", data, settings)
    assert healed.objective == "embeddings"
    assert healed.curve.best < healed.curve.held_out[0][1]
    assert any("language_model" in name for name in healed.untrained)
    assert not any("vision" in name for name in healed.untrained)
    found = [evaluate(source, tmp_path / name, EvalData(photos / "folder")).measures for name in ("plain", "healed")]
    assert found[0].keys() == {"cosine"}
    assert found[1]["cosine"] > found[0]["cosine"]


@pytest.mark.usefixtures("processors")
def test_moments_are_those_of_the_model(source: Path, shown: Path) -> None:
    index = read_index(source)
    names = [name for name, info in index.tensors.items() if len(info.shape) == 2]
    lazy, inputs = model_and_inputs(source, index, TextData(shown, 8), exact=True)
    assert len(lazy.chain.stacks) == 2
    found = {f"{turn.block}.{layer}": turn.moment for turn in layer_moments(lazy, inputs, names)
             for layer in turn.matrix.layers}  # fmt: skip
    model = load_any(source, dtype=torch.float32)
    layers = {name: part for name, part in model.named_modules() if name in found}
    assert len(layers) == len(found) >= 2 * (4 + 7)
    wanted: dict[str, torch.Tensor] = {}

    def see(name: str, args: tuple[torch.Tensor, ...], _: object) -> None:
        x = args[0].double().flatten(0, -2)
        wanted[name] = wanted.get(name, 0) + x.T @ x

    with hooked(layers, see, before=True), torch.no_grad():
        for one in inputs:
            (batch,) = equal_shapes([one])
            model(**batch)
    for name, moment in found.items():
        torch.testing.assert_close(moment.double(), wanted[name], rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.usefixtures("processors")
def test_batches_of_images_are_those_of_each(source: Path, shown: Path) -> None:
    inputs = read(source, shown)[:3]
    assert len({one.read()["input_ids"].shape for one in inputs}) == 2
    model = load_any(source, dtype=torch.float32)
    with torch.inference_mode():
        together = model(**padded(inputs)).logits
        for row, one in zip(together, inputs, strict=True):
            (batch,) = equal_shapes([one])
            alone = model(**batch).logits[0]
            torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("processors")
def test_models_that_see_and_write_are_nearer(source: Path, shown: Path, tmp_path: Path) -> None:
    options = CompressOptions(Target("bits", 2.0))
    report = compress(source, tmp_path / "calibrated", options, calibrate=TextData(shown))
    assert report.manifest.report.bits_per_weight == pytest.approx(2.0, rel=0.02)
    compress(source, tmp_path / "plain", options)
    found = {
        name: evaluate(source, tmp_path / name, EvalData(shown)).measures["kl"] for name in ("plain", "calibrated")
    }
    assert found["calibrated"] < 0.9 * found["plain"]
    settings = DistillSettings(steps=8, eval_every=4, warmup_steps=1)
    healed = heal(tmp_path / "plain", source, tmp_path / "healed", TextData(shown, batch_size=6), settings)
    assert healed.objective == "tokens"
    assert healed.curve.best < healed.curve.held_out[0][1]
    assert not any("vision" in name or "visual" in name for name in healed.untrained)
