"""Chat-format records, as processors' chat templates take them: ``{"messages": [{"role", "content"}, ...]}``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hpa_ext.data.conversations import ROLES, Conversation, Picture, Turn
from hpa_ext.data.record_place import RecordPlace


def chat_conversation(record: Any, number: int, place: RecordPlace) -> Conversation:
    """A conversation from a record.

    `content` is a text, or a list of ``{"type": "text", "text": ...}`` and ``{"type": "image"}``. An image part has its
    path under `image`, `path` or `url`, or stands for the next entry of the record's `images`.

    Raises:
        RecordError: a key is missing or has the wrong contents. FileNotFoundError: an image is not there.
    """
    if not isinstance(record, Mapping):
        raise place.error("record", "a JSON object", record)
    messages = record.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise place.error("messages", "a list of messages", messages)
    listed = record.get("images", record.get("image"))
    listed = [] if listed is None else list(listed) if isinstance(listed, (list, tuple)) else [listed]
    waiting = iter([place.picture(_path(image), f"images[{i}]") for i, image in enumerate(listed)])
    turns = []
    for index, message in enumerate(messages):
        key = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise place.error(key, "an object with 'role' and 'content'", message)
        if message.get("role") not in ROLES:
            raise place.error(f"{key}.role", " or ".join(map(repr, ROLES)), message.get("role"))
        turns.append(Turn(message["role"], tuple(_parts(message.get("content"), f"{key}.content", place, waiting))))
    if next(waiting, None) is not None:
        raise place.error("images", "an image part in messages for each", listed)
    if all(turn.role == "system" for turn in turns):
        raise place.error("messages", "a message of 'user'", [turn.role for turn in turns])
    return Conversation(place.identity(record), tuple(turns), str(place), place.risk_class(record))


def _parts(content: Any, key: str, place: RecordPlace, waiting: Iterator[Picture]) -> Iterator[str | Picture]:
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, Sequence) or not content:
        raise place.error(key, "a text or a list of parts", content)
    for index, part in enumerate(content):
        where = f"{key}[{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif kind == "image":
            named = next((part[name] for name in ("image", "path", "url") if part.get(name) is not None), None)
            picture = place.picture(_path(named), where) if named is not None else next(waiting, None)
            if picture is None:
                raise place.error(where, "a path under 'image', or an entry of the record's 'images' left", part)
            yield picture
        else:
            raise place.error(where, "a part of type 'text' (with 'text') or 'image'", part)


def _path(image: Any) -> Any:
    """The datasets library stores an undecoded image as ``{"path", "bytes"}``."""
    return image["path"] if isinstance(image, Mapping) and image.get("path") is not None else image
