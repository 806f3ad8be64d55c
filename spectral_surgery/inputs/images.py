"""Images, for models that see: a folder of files, made into what the model takes by its image processor."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from spectral_surgery.errors import required
from spectral_surgery.hf.processors import load_image_processor
from spectral_surgery.inputs.folders import MediaFile, UnreadableError, holds, media_files, readable
from spectral_surgery.inputs.kind import Kind, Reading
from spectral_surgery.inputs.model_input import ModelInput
from spectral_surgery.live.stacks import entry_of

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
_GIVEN = frozenset({"pixel_values"})


def read_image(path: Path, mode: str = "RGB") -> Any:
    """An image of Pillow, the right way up, in three colours or as the mode says; of a film the first picture.

    Raises:
        BackendError: when Pillow is not installed.
        UnreadableError: when it is no image, or a part of it is missing.
    """
    image_file, operations = (
        required(f"PIL.{part}", "read images", "'spectral-surgery[images]'") for part in ("Image", "ImageOps")
    )
    try:
        with image_file.open(path) as file:
            image = operations.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, image_file.DecompressionBombError) as error:
        raise UnreadableError(f"{path}: expected an image, got {_reason(error)}.") from None


def _reason(error: Exception) -> str:
    return "no file of a kind that Pillow reads" if "cannot identify" in str(error) else f"a broken one ({error})"


def image_tensors(processor: Any, image: Any, takes: Sequence[str]) -> dict[str, Tensor]:
    """What a model takes of what its processor makes of an image, without the axis of the batch."""
    made = processor(images=[image], return_tensors="pt")
    return {name: tensor[0] for name, tensor in made.items() if name in takes}


def _inputs(reading: Reading, items: Sequence[MediaFile], samples: int) -> list[ModelInput]:
    processor = load_image_processor(reading.folder, trust_remote_code=reading.data.trust_remote_code)
    entry = entry_of(reading.model, _GIVEN)[1]
    takes = list(inspect.signature(entry.forward).parameters)
    config: Any = getattr(entry, "config", None)
    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"

    def read(path: Path) -> dict[str, Tensor]:
        return image_tensors(processor, read_image(path, mode), takes)

    def made(item: MediaFile) -> ModelInput:
        shapes = {name: tuple(tensor.shape) for name, tensor in read(item.path).items()}
        return ModelInput(shapes, partial(read, item.path), answer=item.label)

    return readable(reading, items, samples, made)


IMAGES = Kind(
    "images",
    "images",
    256,
    "images",
    "there is none for",
    "",
    by_objective=False,
    given=_GIVEN,
    is_for=lambda folder, _: holds(folder, SUFFIXES),
    items=lambda reading: media_files(reading.data.file, SUFFIXES),
    inputs=_inputs,
)
