"""LLaVA's data format: ``{"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpa_ext.data.conversations import Conversation, Picture, Turn, to_png
from hpa_ext.data.record_place import RecordPlace

IMAGE_PLACEHOLDER = "<image>"

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def llava_conversation(record: Any, number: int, place: RecordPlace) -> Conversation:
    """A conversation from a record.

    `image` is a path or a list of paths, absent for text alone. Each ``<image>`` in the texts of "human" stands for one
    of them, in order. Turns alternate, beginning with "human"; there may be a "system" turn before them. Line breaks
    next to a placeholder are dropped: the chat template sets its own.

    Raises:
        RecordError: a key is missing or has the wrong contents. FileNotFoundError: an image is not there.
    """
    if not isinstance(record, Mapping):
        raise place.error("record", "a JSON object", record)
    turns = record.get("conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise place.error("conversations", "a list of turns", turns)
    named = record.get("image")
    names = [] if named is None else list(named) if isinstance(named, (list, tuple)) else [named]
    pictures = [
        place.picture(name, f"image[{i}]" if isinstance(named, (list, tuple)) else "image")
        for i, name in enumerate(names)
    ]
    parsed: list[Turn] = []
    used = 0
    for index, turn in enumerate(turns):
        key = f"conversations[{index}]"
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise place.error(key, "an object with texts 'from' and 'value'", turn)
        role = _ROLES.get(turn.get("from", ""))
        expected = "user" if not parsed or parsed[-1].role != "user" else "assistant"
        if role != expected and not (role == "system" and not parsed):
            wanted = next(name for name, value in _ROLES.items() if value == expected)
            raise place.error(f"{key}.from", repr(wanted), turn.get("from"))
        texts = turn["value"].split(IMAGE_PLACEHOLDER)
        wanted_pictures = len(texts) - 1
        if wanted_pictures and role != "user":
            raise place.error(f"{key}.value", f"{IMAGE_PLACEHOLDER} in turns of 'human' alone", turn["value"])
        if used + wanted_pictures > len(pictures):
            count = used + wanted_pictures
            raise place.error("image", f"an image for each {IMAGE_PLACEHOLDER}, at least {count}", named)
        parsed.append(Turn(str(role), tuple(_parts(texts, pictures[used : used + wanted_pictures]))))
        used += wanted_pictures
    if used != len(pictures):
        raise place.error("conversations", f"{len(pictures)} times {IMAGE_PLACEHOLDER}, one for each image", used)
    return Conversation(place.identity(record), tuple(parsed), str(place), place.risk_class(record))


def write_llava_json(
    path: str | Path, conversations: Sequence[Conversation], extra: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Write conversations so that `load_conversations` reads them from there.

    Args:
        path: the file; its folder must exist. Images inside that folder keep their place; others are copied into
            ``<name>-images`` beside the file.
        conversations: what to write.
        extra: further keys of each record.
    """
    path = Path(os.path.abspath(path))
    records = []
    for number, conversation in enumerate(conversations):
        names = [_place_picture(picture, path, number, i) for i, picture in enumerate(conversation.pictures)]
        record: dict[str, Any] = {"id": conversation.id}
        if names:
            record["image"] = names[0] if len(names) == 1 else names
        if conversation.risk_class is not None:
            record["risk_class"] = conversation.risk_class
        back = {value: name for name, value in _ROLES.items()}
        record["conversations"] = [{"from": back[turn.role], "value": _value(turn)} for turn in conversation.turns]
        records.append({**record, **(extra[number] if extra else {})})
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _parts(texts: Sequence[str], pictures: Sequence[Picture]) -> list[str | Picture]:
    parts: list[str | Picture] = []
    for index, text in enumerate(texts):
        if index > 0:
            parts.append(pictures[index - 1])
            text = text.lstrip("\n")
        if index < len(texts) - 1:
            text = text.rstrip("\n")
        if text:
            parts.append(text)
    return parts


def _value(turn: Turn) -> str:
    pieces = [f"{IMAGE_PLACEHOLDER}\n" if isinstance(part, Picture) else part for part in turn.parts]
    return "".join(pieces)


def _place_picture(picture: Picture, path: Path, record: int, index: int) -> str:
    folder = path.parent
    if isinstance(picture.source, Path):
        absolute = Path(os.path.abspath(picture.source))
        if absolute.is_relative_to(folder):
            return absolute.relative_to(folder).as_posix()
    suffix = picture.source.suffix if isinstance(picture.source, Path) else ".png"
    target = folder / f"{path.stem}-images" / f"{record:05d}-{index}{suffix}"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(picture.source.read_bytes() if isinstance(picture.source, Path) else to_png(picture))
    return target.relative_to(folder).as_posix()
