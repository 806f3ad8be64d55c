"""What makes inputs of images, of texts with images and of sound, from the folder of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectral_surgery.errors import CheckpointError, required
from spectral_surgery.hf.load_errors import loading


def load_image_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The image processor of a model. Raises CheckpointError when the folder has none."""
    return _load("AutoImageProcessor", folder, "image processor", trust_remote_code)


def load_feature_extractor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The feature extractor of a model that hears; its ``sampling_rate`` says what sound it takes.

    Raises CheckpointError when the folder has none.
    """
    return _load("AutoFeatureExtractor", folder, "feature extractor", trust_remote_code)


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """What makes inputs of texts with images, with its ``tokenizer``.

    Raises:
        BackendError: when transformers is not installed.
        CheckpointError: when the folder has none.
    """
    processor = _load("AutoProcessor", folder, "processor of texts with images", trust_remote_code)
    if not hasattr(processor, "tokenizer"):  # where there is none, transformers gives a tokenizer alone
        raise CheckpointError(f"{folder}: has no processor of texts with images. Give text, or chats without images.")
    return processor


def _load(auto_class: str, folder: Path, what: str, trust_remote_code: bool) -> Any:
    transformers = required("transformers", "run models")
    with loading(folder, f"has no {what} that can be loaded"):
        cls = getattr(transformers, auto_class)
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
