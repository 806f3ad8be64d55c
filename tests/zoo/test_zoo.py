"""A sample of the zoo: a model for every special case, each through every step that applies to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import transformers

from tests.zoo.corpus import Corpus, make_corpus
from tests.zoo.entries import ZOO
from tests.zoo.entry import Entry
from tests.zoo.outcome import Outcome, Status
from tests.zoo.steps import STEPS, Step, run_step
from tests.zoo.subject import Subject, prepare
from tests.zoo.table import PAGE, results_in

# name: what is special about it
SAMPLE = {
    "llama": "one of many",
    "gpt2": "Conv1D, a tied head",
    "decision_transformer": "Conv1D and Linear",
    "gemma3_text": "scaled embeddings, tied",
    "mixtral": "experts in files of one tensor each, fused in the module",
    "gpt_oss": "fused experts with biases, transposed",
    "granitemoe": "fused experts with a class of their own",
    "falcon": "linear layers of a class of their own",
    "olmo": "no parameter beside the compressed ones",
    "mamba": "state space",
    "zamba2": "one block used by several layers",
    "distilbert": "a tied head with a bias",
    "bert-cls": "a classifier",
    "nomic_bert": "one tensor in the file, three layers in the module",
    "vit": "names changed at loading",
    "llava": "images and text, names changed at loading",
    "clip": "two towers",
    "mask2former": "layers that are also in a Python list",
    "t5": "encoder and decoder",
    "marian": "encoder and decoder that share an embedding",
    "whisper": "speech",
    "own-code": "code of its own",
}
HEALED = ("llama", "gpt2", "distilbert", "own-code")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, different for every architecture


def _applies(entry: Entry, step: Step) -> bool:
    if step.name == "heal":
        return entry.name in HEALED
    if step.name == "calibrate":
        return entry.text
    return step.name != "swap" or bool(entry.mixer)


Work = tuple[Subject, dict[str, Outcome]]
InWork = Callable[[str], Work]
BY_NAME = {step.name: step for step in STEPS}
LISTED = results_in(PAGE.read_text(encoding="utf-8"))  # what the page says is not applicable
CASES = [(name, step) for name in SAMPLE for step in STEPS if _applies(ZOO[name], step)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@pytest.fixture(scope="module")
def in_work(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> InWork:
    """The model of a name with the outcomes so far; one at a time is kept."""
    kept: dict[str, Work] = {}

    def get(name: str) -> Work:
        if name not in kept:
            kept.clear()
            kept[name] = prepare(ZOO[name], tmp_path_factory.mktemp("zoo"), corpus), {}
        return kept[name]

    return get


def _run(step: Step, subject: Subject, done: dict[str, Outcome]) -> None:
    """The step and what it needs, each once, also where a test is run alone."""
    for need in step.needs:
        _run(BY_NAME[need], subject, done)
    if step.name not in done:
        done[step.name] = run_step(step, subject, done)


@pytest.mark.parametrize(("name", "step"), CASES, ids=[f"{name}-{step.name}" for name, step in CASES])
def test_step(in_work: InWork, name: str, step: Step) -> None:
    subject, done = in_work(name)
    _run(step, subject, done)
    outcome = done[step.name]
    listed = LISTED[name]["steps"][step.name]["status"]
    assert outcome.status in (Status.OK, Status.NOT_APPLICABLE), outcome.line
    assert (outcome.status is Status.NOT_APPLICABLE) == (listed == Status.NOT_APPLICABLE), outcome.line


def test_the_sample_has_both_dtypes_and_both_layouts() -> None:
    sample = [ZOO[name] for name in SAMPLE]
    assert {entry.half for entry in sample} == {False, True}
    assert {entry.sharded for entry in sample} == {False, True}
