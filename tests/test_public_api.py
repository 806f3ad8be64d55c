"""The public names: a change here is a change users see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import spectral_surgery


def test_every_public_name_is_what_the_stub_says() -> None:
    assert set(spectral_surgery.__all__) <= set(dir(spectral_surgery))
    for name in spectral_surgery.__all__:
        value = getattr(spectral_surgery, name)
        assert getattr(value, "__name__", name).removeprefix("spectral_surgery.") == name
    assert not hasattr(spectral_surgery, "nothing")


def test_no_public_name_is_that_of_a_module() -> None:
    modules = {path.stem for path in Path(spectral_surgery.__file__).parent.iterdir()}
    assert modules & set(spectral_surgery.__all__) == {"live"}
    inner = {path.stem for path in Path(spectral_surgery.live.__file__).parent.iterdir()}
    assert not inner & set(spectral_surgery.live.__all__)


def test_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'triton', 'huggingface_hub', 'matplotlib'}"
    code = f"import sys, spectral_surgery; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
