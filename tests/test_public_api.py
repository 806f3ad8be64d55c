"""The public names: a change here is a change users see."""

from __future__ import annotations

import subprocess
import sys

import spectral_surgery


def test_public_names() -> None:
    expected = (
        "AdapterSpec AdapterState Basis CalibrationData CheckpointIndex CompressOptions CompressReport "
        "CompressedCheckpoint DecompressReport DistillSettings EncodedSpectrum EncodingReport FFTNetConfig "
        "FFTNetForCausalLM FFTNetForMaskedLM FFTNetForSequenceClassification FFTNetModel HealData HealReport Healing "
        "METHODS MIXERS ModuleTargets QuantizedSpectrum Run SparseSpectralTensor SpectralConv1D SpectralEmbedding "
        "SpectralLinear SpectralSurgeryError TRANSFORMS Target accelerate_peft bits_per_weight compress "
        "compress_model compress_shard decompress detach encode energy_kept evaluate "
        "extract freeze_spectra heal inject kept_spectra load_compressed merge open_compressed pull push "
        "read_adapter read_index relative_error resolve snr_db sst state_of swap swap_attention train "
        "train_from_scratch train_kept unfreeze_spectra unmerge write_adapter"
    )
    assert " ".join(sorted(spectral_surgery.__all__)) == expected
    assert set(spectral_surgery._HOMES) == set(spectral_surgery.__all__) <= set(dir(spectral_surgery))


def test_every_public_name_resolves() -> None:
    for name in spectral_surgery.__all__:
        value = getattr(spectral_surgery, name)
        assert getattr(value, "__name__", name) == name
    assert not hasattr(spectral_surgery, "nothing")


def test_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'triton', 'huggingface_hub', 'matplotlib'}"
    code = f"import sys, spectral_surgery; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
