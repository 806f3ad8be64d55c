"""Laws of plans, for any checkpoint: every weight is in one part of one shard, and files do not matter."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.files.compressed.plan import PART_WEIGHTS, Plan, make_plan
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.header import TensorInfo
from spectral_surgery.files.index import CheckpointIndex, read_index
from spectral_surgery.files.reader import read_bytes
from tests.support.checkpoints import llama_like, write_folder

OPTIONS = CompressOptions(Target("bits", 3.0), min_weights=1)
NAMES = ("embed_tokens.weight", "q_proj.weight", "conv.weight", "mlp.experts.up_proj", "norm.weight", "lm_head.weight")
SIDE = st.one_of(st.integers(1, 70), st.sampled_from([512, 5000]))
SHAPES = st.one_of(
    st.tuples(SIDE),
    st.tuples(SIDE, SIDE),
    st.tuples(st.integers(1, 9), SIDE, SIDE),
    st.tuples(*[st.integers(1, 30)] * 2, *[st.just(3)] * 2),
)
TENSORS = st.dictionaries(
    st.tuples(st.integers(0, 3), st.sampled_from(NAMES)).map(lambda pair: f"layers.{pair[0]}.{pair[1]}"),
    st.tuples(SHAPES, st.sampled_from(["F32", "BF16", "F8_E4M3", "I64"])),
    min_size=1,
    max_size=8,
)


def index_of(tensors: dict[str, tuple[tuple[int, ...], str]]) -> CheckpointIndex:
    infos = {n: TensorInfo(n, dtype, shape, Path("none"), 0, 0) for n, (shape, dtype) in sorted(tensors.items())}
    return CheckpointIndex(Path("none"), infos, (), (), (), {}, {})


def plan_of(tensors: dict[str, tuple[tuple[int, ...], str]], tile: int) -> Plan:
    assume(any(dtype != "I64" and len(shape) > 1 for shape, dtype in tensors.values()))
    options = CompressOptions(Target("bits", 3.0), tile=tile, min_weights=1, transform="identity")
    return make_plan(index_of(tensors), options, compare=False)


@given(tensors=TENSORS, tile=st.sampled_from([1, 7, 64, 500]))
def test_every_weight_is_in_one_part_and_parts_are_small(
    tensors: dict[str, tuple[tuple[int, ...], str]], tile: int
) -> None:
    plan = plan_of(tensors, tile)
    assert {tensor.info.name for tensor in plan.tensors} | plan.copied.keys() == tensors.keys()
    assert plan.copied.keys().isdisjoint(tensor.info.name for tensor in plan.tensors)
    for tensor in plan.tensors:
        assert tensor.rows * tensor.columns == tensor.info.numel
        ends = [0, *(stop for _, stop in tensor.parts)]
        assert [start for start, _ in tensor.parts] == ends[:-1]
        assert ends[-1] == tensor.rows
        assert all(start < stop for start, stop in pairwise(ends))
        if "experts" in tensor.info.name and len(tensor.info.shape) == 3:
            height = tensor.info.shape[1]
            assert {number * height for number in range(tensor.info.shape[0])} <= {start for start, _ in tensor.parts}
        smallest = tile * tensor.columns  # a frame at the least
        assert max(stop - start for start, stop in tensor.parts) * tensor.columns <= max(PART_WEIGHTS, 2 * smallest)


@given(tensors=TENSORS, count=st.integers(1, 9))
def test_shards_together_are_the_whole_and_have_nothing_in_common(
    tensors: dict[str, tuple[tuple[int, ...], str]], count: int
) -> None:
    plan = plan_of(tensors, 64)
    shards = [plan.shard(number, count) for number in range(count)]
    ordinals = sorted(unit.ordinal for shard in shards for unit in shard)
    assert ordinals == [unit.ordinal for unit in plan.units] == list(range(len(plan.units)))
    loads = [sum(unit.weights for unit in shard) for shard in shards]
    largest = max(unit.weights for unit in plan.units)
    assert sum(loads) == plan.weights
    assert max(loads) - min(loads) <= largest  # or the last unit of the fuller one would have gone to the other


@settings(max_examples=5)
@given(order=st.permutations(sorted(llama_like())), shards=st.integers(1, 3))
def test_bytes_depend_neither_on_the_order_of_tensors_nor_on_files(
    order: list[str], shards: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, tensors = tmp_path_factory.mktemp("order"), llama_like()
    write_folder(root / "plain", tensors)
    write_folder(root / "other", {name: tensors[name] for name in order}, shards=shards, order=order)
    for name in ("plain", "other"):
        compress(root / name, root / f"{name}-small", OPTIONS)
    one, other = (read_index(root / f"{name}-small").tensors for name in ("plain", "other"))
    assert one.keys() == other.keys()
    for name, info in one.items():
        assert read_bytes(info, 0, info.nbytes) == read_bytes(other[name], 0, info.nbytes), name
