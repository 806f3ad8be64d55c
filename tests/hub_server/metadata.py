"""The Hub's check of a card's metadata: YAML, and fields that mean what they should.

Source: https://huggingface.co/docs/hub/model-cards#model-card-metadata, and the texts the Hub refuses with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from tests.hub_server.exchange import Request, Response, answer
from tests.hub_server.hub import LoopbackHub

RELATIONS = ("adapter", "finetune", "merge", "quantized")
_FRONT = re.compile(r"\ufeff?---\n(.*?)\n---", re.DOTALL)
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]*")
# what each value must be, and what is said of one that is not
_FIELDS: Mapping[str, tuple[Callable[[str], object], str]] = {
    "base_model": (_REPOSITORY.fullmatch, "is not valid. Use a model id from https://hf.co/models."),
    "base_model_relation": (RELATIONS.__contains__, f"must be one of {', '.join(RELATIONS)}"),
    "license": (_WORD.fullmatch, "is not a known license"),
    "tags": (bool, "must be texts"),
    "library_name": (_WORD.fullmatch, "must be the name of a library"),
    "pipeline_tag": (_WORD.fullmatch, "must be the name of a task"),
}


def validate_yaml(hub: LoopbackHub, request: Request) -> Response:  # noqa: ARG001 - every handler is given the Hub
    """POST /api/validate-yaml: 400 with the errors when there are any."""
    errors = list(problems(request.json()["content"]))
    return answer({"errors": [{"message": text} for text in errors], "warnings": []}, 400 if errors else 200)


def problems(card: str) -> Iterator[str]:
    """What the Hub would refuse in a card."""
    from yaml import YAMLError, safe_load  # type: ignore[import-untyped]

    front = _FRONT.match(card.replace("\r\n", "\n"))
    if front is None:
        return
    try:
        data = safe_load(front.group(1))
    except YAMLError as error:
        yield f"bad YAML: {' '.join(str(error).split())}"
        return
    if not isinstance(data, dict):
        yield "the metadata must be keys and values"
        return
    for field, (fits, text) in _FIELDS.items():
        value = data.get(field, [])
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, str) or not fits(item):
                yield f'"{field}" with value "{item}" {text}'
