"""Data files: LLaVA JSON, chat JSON and the datasets library; what is drawn, and what is refused by record and key."""

from __future__ import annotations

import json
import sys
import types

import numpy
import pytest
from PIL import Image

from hpa_ext.data.conversations import Conversation, Picture, Turn, from_sample
from hpa_ext.data.llava_json import write_llava_json
from hpa_ext.data.record_place import RecordError
from hpa_ext.data.records import load_conversations
from hpa_ext.data.samples import Sample


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "deep/c.png")):
        Image.new("RGB", (8, 6), (50 * number, 0, 0)).save(tmp_path / "images" / name)
    return tmp_path


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def save(folder, records, name="data.json"):
    path = folder / name
    if name.endswith("l"):
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    else:
        path.write_text(json.dumps(records))
    return path


def load(folder, records, name="data.json", **options):
    return load_conversations(save(folder, records, name), folder / "images", **options)


def shape(conversation):
    """Roles and parts, pictures by their names in brackets."""
    return [
        (turn.role, [f"[{part.name}]" if isinstance(part, Picture) else part for part in turn.parts])
        for turn in conversation.turns
    ]


GOOD = {"id": "x1", "image": "a.png", "conversations": [human("<image>\nWhat?"), gpt("This.")]}


def test_llava_records(folder):
    found = load(
        folder,
        [
            GOOD,
            {"conversations": [human("Hello"), gpt("Hi"), human("And?"), gpt("So.")], "risk_class": "weapons"},
            {"id": 7, "image": ["b.jpg", "deep/c.png"],
             "conversations": [{"from": "system", "value": "Be brief."}, human("<image>\n<image>\nSame?"), gpt("No")]},
            {"id": 8, "image": "a.png", "conversations": [human("What?\n<image>")]},
        ],
    )  # fmt: skip
    assert shape(found[0]) == [("user", ["[a.png]", "What?"]), ("assistant", ["This."])]
    assert shape(found[1])[2:] == [("user", ["And?"]), ("assistant", ["So."])]
    assert shape(found[2])[:2] == [("system", ["Be brief."]), ("user", ["[b.jpg]", "[deep/c.png]", "Same?"])]
    assert shape(found[3]) == [("user", ["What?", "[a.png]"])]
    assert [item.id for item in found] == ["x1", "#1", "7", "8"]
    assert [item.risk_class for item in found] == [None, "weapons", None, None]
    assert found[0].pictures[0].open().size == (8, 6)
    assert found.provenance["records"] == found.provenance["drawn"] == 4 and len(found.provenance["sha256"]) == 64
    assert shape(found[1].prompt()) == [("user", ["Hello"])]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_chat_records(folder, name):
    records = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"id": "y", "images": ["b.jpg"], "messages": [
            {"role": "system", "content": [{"type": "text", "text": "S"}]},
            {"role": "user", "content": [
                {"type": "image", "image": "a.png"}, {"type": "image"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]},
    ]  # fmt: skip
    found = load(folder, records, name)
    assert shape(found[0]) == [("user", ["Hi"]), ("assistant", ["Hello"])]
    assert [part for _, parts in shape(found[1]) for part in parts] == ["S", "[a.png]", "[b.jpg]", "?", "A"]
    assert [picture.open().getpixel((0, 0))[0] // 50 for picture in found[1].pictures] == [0, 1]


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"conversations": []}, "conversations"),
        ({"conversations": "hello"}, "conversations"),
        ({"conversations": [human("<image>\nWhat?")]}, "image"),
        ({"image": "a.png", "conversations": [human("What?"), gpt("x")]}, "conversations"),
        ({"image": ["a.png"], "conversations": [human("<image><image>")]}, "image"),
        ({"image": 3, "conversations": [human("<image>")]}, "image"),
        ({"image": "a.png", "conversations": [human("hi"), gpt("<image>")]}, r"conversations\[1\]\.value"),
        ({"conversations": [gpt("x")]}, r"conversations\[0\]\.from"),
        ({"conversations": [human("x"), human("y")]}, r"conversations\[1\]\.from"),
        ({"conversations": [human("x"), {"from": "bard", "value": "y"}]}, r"conversations\[1\]\.from"),
        ({"conversations": [human("x"), {"from": "gpt"}]}, r"conversations\[1\]"),
        ({"conversations": [human("x")], "risk_class": 5}, "risk_class"),
        ({"image": "/etc/passwd", "conversations": [human("<image>")]}, "image"),
        ({"image": "../data.json", "conversations": [human("<image>")]}, "image"),
        ({"image": "deep/../../data.json", "conversations": [human("<image>")]}, "image"),
        ({"image": "C:\\x.png", "conversations": [human("<image>")]}, "image"),
        ({"image": "http://somewhere/x.png", "conversations": [human("<image>")]}, "image"),
        ("text", "record"),
    ],
)
def test_a_malformed_llava_record_is_named(folder, record, key):
    with pytest.raises(RecordError, match=rf"data\.json: record 1: {key}: expected .*got "):
        load(folder, [GOOD, record])


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": ["hi"]}, r"messages\[0\]"),
        ({"messages": [{"role": "human", "content": "x"}]}, r"messages\[0\]\.role"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\]\.content"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, r"messages\[0\]\.content\[0\]"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"messages\[0\]\.content\[0\]"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": "../x"}]}]}, r"messages\[0\]\.content"),
        ({"images": ["a.png"], "messages": [{"role": "user", "content": "x"}]}, "images"),
    ],
)
def test_a_malformed_chat_record_is_named(folder, record, key):
    with pytest.raises(RecordError, match=rf"data\.json: record 1: {key}.*: expected .*got "):
        load(folder, [{"messages": [{"role": "user", "content": "ok"}]}, record])


def test_an_absent_image_is_named_before_work(folder):
    with pytest.raises(FileNotFoundError, match=r"data\.json: record 0: image: no such image: .*images/z\.png"):
        load(folder, [{**GOOD, "image": "z.png"}])
    (folder / "images" / "bad.png").write_text("no image")
    (found,) = load(folder, [{**GOOD, "image": "bad.png"}])
    with pytest.raises(OSError, match=r"bad\.png: not an image"):
        found.pictures[0].open()


def test_links_in_the_folder_are_followed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (3, 3)).save(elsewhere / "far.png")
    (folder / "images" / "link").symlink_to(elsewhere)
    (found,) = load(folder, [{**GOOD, "image": "link/far.png"}])
    assert found.pictures[0].open().size == (3, 3)


def test_files_of_other_kinds_are_refused(folder):
    for text, message in (
        ("{", "not JSON"),
        ('{"a": 1}', "expected a list of records, got dict"),
        ("[]", "expected at least one record"),
        ('[{"instr": 1}]', r"record 0: expected the key 'conversations' or 'messages', got \['instr'\]"),
    ):
        (folder / "data.json").write_text(text)
        with pytest.raises(RecordError, match=message):
            load_conversations(folder / "data.json")
    (folder / "data.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(RecordError, match="UTF-8"):
        load_conversations(folder / "data.json")
    (folder / "data.jsonl").write_text('{"messages": 1}\n{')
    with pytest.raises(RecordError, match="line 2: not JSON"):
        load_conversations(folder / "data.jsonl")
    with pytest.raises(FileNotFoundError):
        load_conversations(folder / "absent.json")
    with pytest.raises(NotADirectoryError, match="folder of the images"):
        load_conversations(save(folder, [GOOD]), folder / "absent")


def test_drawing_is_reproducible(folder):
    records = [{"id": str(number), "conversations": [human(f"q{number}"), gpt("a")]} for number in range(50)]
    first, again = load(folder, records, samples=10, seed=3), load(folder, records, samples=10, seed=3)
    other = load(folder, records, samples=10, seed=4)
    ids = [item.id for item in first]
    assert ids == [item.id for item in again] != [item.id for item in other]
    assert len(set(ids)) == 10 and ids == sorted(ids, key=int)
    assert first.provenance["ids"] == ids and first.provenance["seed"] == 3
    assert first.provenance["sha256"] == other.provenance["sha256"]
    with pytest.raises(ValueError, match="samples: expected at most 50"):
        load(folder, records, samples=51)


def test_a_record_that_is_not_drawn_is_not_looked_at(folder):
    drawn = [load(folder, [GOOD, GOOD], samples=1, seed=seed).provenance["ids"] for seed in range(8)]
    assert drawn == [["x1"]] * 8
    outcomes = set()
    for seed in range(8):
        try:
            outcomes.add(load(folder, [GOOD, {"conversations": "broken"}], samples=1, seed=seed)[0].id)
        except RecordError:
            outcomes.add("refused")
    assert outcomes == {"x1", "refused"}


def test_contents_decide_the_digest(folder):
    (one,) = load(folder, [GOOD])
    (two,) = load(folder, [{**GOOD, "id": "other"}])
    (text,) = load(folder, [{**GOOD, "conversations": [human("<image>\nWhat?"), gpt("That.")]}])
    before = one.digest()
    assert before == two.digest() != text.digest()
    Image.new("RGB", (8, 6), (1, 2, 3)).save(folder / "images" / "a.png")
    assert one.digest() != before


def test_what_is_written_is_read_back(folder):
    image = numpy.zeros((4, 5, 3), dtype=numpy.uint8)
    sample = from_sample(Sample(image, "What is it", "black", "zorv"), 3)
    (record,) = load(folder, [GOOD])
    several = Conversation("m", (Turn("user", (*record.pictures, *sample.pictures, "Both?")),), "here")
    out = folder / "out"
    out.mkdir()
    write_llava_json(out / "set.json", [sample, record, several])
    found = load_conversations(out / "set.json")
    assert [shape(item)[0][1][-1] for item in found] == ["What is it", "What?", "Both?"]
    assert [item.risk_class for item in found] == ["zorv", None, None]
    assert found[0].pictures[0].open().size == (5, 4) and found[1].pictures[0].open().size == (8, 6)
    assert sorted(path.name for path in out.iterdir()) == ["set-images", "set.json"]
    assert [item.digest() for item in found][1] == record.digest()
    write_llava_json(folder / "inside.json", [record])  # images below the file's folder stay where they are
    assert json.loads((folder / "inside.json").read_text())[0]["image"] == "images/a.png"
    assert not (folder / "inside-images").exists()


def test_directories_need_the_datasets_library(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="datasets library, which is not installed"):
        load_conversations(folder)
    picture = Image.new("RGB", (2, 2))
    records = [{"image": picture, "conversations": GOOD["conversations"]}]
    fake = types.SimpleNamespace(load_from_disk=lambda path: records)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (found,) = load_conversations(folder)
    assert found.pictures[0].open().size == (2, 2) and len(found.pictures[0].digest()) == 64
    fake.load_from_disk = lambda path: {"train": records}
    with pytest.raises(ValueError, match="several splits"):
        load_conversations(folder)
    fake.load_from_disk = lambda path: (_ for _ in ()).throw(FileNotFoundError("no"))
    with pytest.raises(ValueError, match="not a directory"):
        load_conversations(folder)
