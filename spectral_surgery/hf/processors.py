"""What makes inputs of images and of sound, from the folder of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectral_surgery.hf.load_errors import loading, required


def load_image_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The image processor of a model.

    Raises:
        CheckpointError: when the folder has none.
    """
    return _load("AutoImageProcessor", folder, "image processor", trust_remote_code)


def load_feature_extractor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The feature extractor of a model that hears; its ``sampling_rate`` says what sound it takes.

    Raises:
        CheckpointError: when the folder has none.
    """
    return _load("AutoFeatureExtractor", folder, "feature extractor", trust_remote_code)


def _load(auto_class: str, folder: Path, what: str, trust_remote_code: bool) -> Any:
    transformers = required("transformers", "run models")
    with loading(folder, f"has no {what} that can be loaded"):
        cls = getattr(transformers, auto_class)
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
