"""The file for users who forget the import: it loads the folder, and goes away with the compression."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spectral_surgery.checkpoint.shim import SHIM_FILE, is_shim, with_shim, without_shim
from spectral_surgery.workflows.decompress import decompress
from tests.support.compressed import compressed_folder

pytest.importorskip("transformers")


def test_code_of_the_model_itself_is_kept() -> None:
    own = {"auto_map": {"AutoModel": "modeling_own.Own"}, "a": 1}
    assert with_shim(own) == without_shim(own) == own
    assert not is_shim(own["auto_map"])
    assert without_shim(with_shim({"a": 1})) == {"a": 1}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_decompress_takes_it_away(tmp_path: Path) -> None:
    folder = compressed_folder("llama", tmp_path)
    assert (folder / SHIM_FILE).exists()
    assert is_shim(json.loads((folder / "config.json").read_text())["auto_map"])
    decompress(folder, tmp_path / "plain")
    assert not (tmp_path / "plain" / SHIM_FILE).exists()
    source, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "plain"))
    assert source == plain


@pytest.mark.slow
def test_loads_without_the_import(tmp_path: Path) -> None:
    folder = compressed_folder("llama", tmp_path)
    code = (
        "import sys, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "assert type(model) is transformers.LlamaForCausalLM\n"
        "from spectral_surgery.integrations.spectral_saving import spectral_layers\n"
        "assert len(list(spectral_layers(model))) == 16\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)
