"""The whole zoo: ``python -m tests.zoo`` writes docs/architectures.md; ``python -m tests.zoo NAME ...`` checks some."""

from __future__ import annotations

import argparse
import os
import warnings

RESULTS = "build/zoo"


def main() -> None:
    """Check what is not checked yet, then write the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; all when none is named")
    parser.add_argument("--processes", type=int, default=max(os.cpu_count() or 1, 1), help="models at a time")
    parser.add_argument("--again", action="store_true", help="check also what has been checked")
    parser.add_argument("--renew", action="store_true", help="put the rows of these models into the page as it is")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    warnings.simplefilter("ignore")
    _go(given)


def _go(given: argparse.Namespace) -> None:
    import torch
    import transformers

    import spectral_surgery  # noqa: F401 - makes transformers know compressed folders
    from tests.zoo.corpus import make_corpus
    from tests.zoo.entries import KINDS, ZOO
    from tests.zoo.left_out import LEFT_OUT
    from tests.zoo.steps import check
    from tests.zoo.sweep import ROOT, fingerprint, read_results, sweep
    from tests.zoo.table import PAGE, page, reasons, renewed_in, results_in, write_page

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _import_all()
    file = ROOT / RESULTS / "results.jsonl"
    stamp = f"{fingerprint()}-{os.getpid()}" if given.again else fingerprint()
    entries = [ZOO[name] for name in given.names] if given.names else [*ZOO.values()]
    corpus = make_corpus(file.parent / "corpus")
    try:
        sweep(entries, file, stamp=stamp, check=check, corpus=corpus, processes=given.processes, say=_say)
    except KeyboardInterrupt:
        _say("interrupted: run it again to go on")
    results = read_results(file, stamp)
    for line in reasons(results[entry.name] for entry in entries if entry.name in results):
        _say(line)
    if not given.names:
        write_page(page(KINDS, LEFT_OUT, results))
    elif given.renew:
        before, names = PAGE.read_text(encoding="utf-8"), {*given.names} & results.keys()
        results = results_in(before) | {name: results[name] for name in names}
        write_page(page(KINDS, LEFT_OUT, results, again=[*renewed_in(before), *names]))


def _say(line: str) -> None:
    print(line, flush=True)


def _import_all() -> None:
    """What every child would import again, for seconds."""
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM, Qwen2VLForConditionalGeneration, ViTModel, Wav2Vec2ForCTC  # noqa: F401

    import spectral_surgery.commands.compress
    import spectral_surgery.commands.heal  # noqa: F401


if __name__ == "__main__":
    main()
