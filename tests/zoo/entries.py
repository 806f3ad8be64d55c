"""All models of the zoo, by name."""

from __future__ import annotations

from tests.zoo.decoders import DECODERS
from tests.zoo.dense_prediction import DENSE_PREDICTION
from tests.zoo.encoder_decoders import ENCODER_DECODERS
from tests.zoo.encoders import ENCODERS
from tests.zoo.entry import Entry
from tests.zoo.experts import EXPERTS_OF_TEXT
from tests.zoo.heads import HEADS
from tests.zoo.long_tail import (
    DECODERS_BY_RULE,
    IMAGES_BY_RULE,
    MULTIMODAL_BY_RULE,
    OTHER_BY_RULE,
    TEXTS_BY_RULE,
)
from tests.zoo.others import OTHERS
from tests.zoo.ours import OURS
from tests.zoo.speech import SPEECH
from tests.zoo.state_space import RECURRENT
from tests.zoo.text_and_image import TEXT_AND_IMAGE
from tests.zoo.vision import VISION
from tests.zoo.vision_language import VISION_LANGUAGE

KINDS: dict[str, tuple[Entry, ...]] = {
    "Decoders": DECODERS,
    "Mixtures of experts": EXPERTS_OF_TEXT,
    "State space models and recurrences": RECURRENT,
    "Encoders": ENCODERS,
    "Encoder-decoders": ENCODER_DECODERS,
    "Other heads, ties and parts": HEADS,
    "Images and videos": VISION,
    "Segmentation, detection, depth": DENSE_PREDICTION,
    "Text and images, two towers": TEXT_AND_IMAGE,
    "Vision-language models": VISION_LANGUAGE,
    "Speech, sound and music": SPEECH,
    "Others": OTHERS,
    "Not of transformers": OURS,
    "By rule: decoders": DECODERS_BY_RULE,
    "By rule: other models of text": TEXTS_BY_RULE,
    "By rule: images and videos": IMAGES_BY_RULE,
    "By rule: several inputs, run on text": MULTIMODAL_BY_RULE,
    "By rule: speech, pairs and parts": OTHER_BY_RULE,
}
ZOO: dict[str, Entry] = {entry.name: entry for entries in KINDS.values() for entry in entries}
