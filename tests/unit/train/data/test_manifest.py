import json
from pathlib import Path

import pytest

from f2l_vllm.train.data.manifest import Example, read_manifest, write_jsonl, write_manifest

ROW = {
    "id": "a",
    "video_path": "videos/a.mp4",
    "prompt": "What happens?",
    "target_text": "A dog runs.",
    "task_type": "caption",
    "dataset": "dogs",
    "split": "train",
    "metadata": {},
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_the_published_layout_is_read(tmp_path):
    later = ROW | {"id": "b", "video_path": "/data/b.mp4", "metadata": {"start": 1, "end": 2.5, "title": "Ä"}}
    first, second = read_manifest(write(tmp_path / "m.jsonl", ROW, "", later))
    assert first.video_path == tmp_path / "videos" / "a.mp4"
    assert (first.prompt, first.target_text, first.split) == ("What happens?", "A dog runs.", "train")
    assert first.span is None
    assert second.video_path == Path("/data/b.mp4")
    assert second.span == (1.0, 2.5)
    assert second.metadata["title"] == "Ä"


def test_the_cut_of_a_published_clip_is_kept_as_metadata_and_is_no_span(tmp_path):
    row = ROW | {"clip_start_sec": 12.0, "clip_end_sec": 20.0}
    (example,) = read_manifest(write(tmp_path / "m.jsonl", row))
    assert example.metadata == {"clip_start_sec": 12.0, "clip_end_sec": 20.0}
    assert example.span is None


def test_an_answer_may_be_missing_until_a_teacher_gives_it(tmp_path):
    (example,) = read_manifest(write(tmp_path / "m.jsonl", ROW | {"target_text": ""}))
    assert example.target_text == ""


def test_one_split_is_chosen_and_an_unknown_one_names_those_there_are(tmp_path):
    path = write(tmp_path / "m.jsonl", ROW, ROW | {"id": "b", "split": "test"})
    assert [example.id for example in read_manifest(path, "test")] == ["b"]
    with pytest.raises(ValueError, match=r"no example of split 'val'; choose one of test, train"):
        read_manifest(path, "val")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"id": "b", ', r"not JSON"),
        ('["b"]', r"a list, not an object with the fields id, video_path"),
        (b'{"id": "\xff"}', r"not JSON"),
        ({key: ROW[key] for key in ROW if key != "prompt"}, r"field prompt: missing"),
        (ROW | {"id": 7}, r"field id: 7 is not a string"),
        (ROW | {"id": "b", "prompt": "  "}, r"field prompt: empty"),
        (ROW | {"id": "b", "split": None}, r"field split: None is not a string"),
        (ROW | {"id": "b", "video_path": "a\0.mp4"}, r"field video_path: holds a zero byte"),
        (ROW | {"id": "b", "target": "x"}, r"field target: unknown; put it into metadata"),
        (ROW | {"id": "b", "metadata": [1]}, r"field metadata: \[1\] is not an object"),
        (ROW | {"id": "b", "metadata": {"start": 1}}, r"field metadata.end is None; a span needs start and end"),
        (ROW | {"id": "b", "metadata": {"start": "1", "end": 2}}, r"field metadata.start is '1'"),
        (ROW | {"id": "b", "metadata": {"start": True, "end": 2}}, r"field metadata.start is True"),
        (ROW | {"id": "b", "metadata": {"start": 0, "end": float("nan")}}, r"field metadata.end is nan"),
        (ROW | {"id": "b", "metadata": {"start": 0, "end": 10**400}}, r"field metadata.end is 1000"),
        (ROW | {"id": "b", "metadata": {"start": 3, "end": 3}}, r"field metadata.start is 3 .* 0 <= start < end"),
        (ROW | {"id": "b", "metadata": {"start": -1, "end": 3}}, r"field metadata.start is -1"),
        (ROW, r"field id: 'a' is also the id of line 1"),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path, line, what):
    path = tmp_path / "bad.jsonl"
    bad = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path.write_bytes(json.dumps(ROW).encode() + b"\n\n" + bad + b"\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: {what}"):
        read_manifest(path)


def test_an_empty_or_missing_manifest_says_what_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"holds no example; write one JSON object a line"):
        read_manifest(write(tmp_path / "m.jsonl", ""))
    with pytest.raises(ValueError, match=r"is not a file; name a JSONL manifest"):
        read_manifest(tmp_path)


def example(name: str, video: Path) -> Example:
    return Example(name, video, "What?", "", "caption", "dogs", "train", {"start": 0, "end": 1.5})


def test_a_manifest_moves_together_with_the_videos_in_its_folder(tmp_path):
    examples = [example("a", tmp_path / "set" / "videos" / "a.mp4"), example("b", tmp_path / "elsewhere.mp4")]
    write_manifest(tmp_path / "set" / "m.jsonl", examples)
    assert read_manifest(tmp_path / "set" / "m.jsonl") == examples
    (tmp_path / "set").rename(tmp_path / "moved")
    moved = read_manifest(tmp_path / "moved" / "m.jsonl")
    assert [one.video_path for one in moved] == [tmp_path / "moved/videos/a.mp4", tmp_path / "elsewhere.mp4"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "m.jsonl"
    write_manifest(path, [example("a", tmp_path / "a.mp4")])
    before = path.read_bytes()
    twice = [example("b", tmp_path / "b.mp4"), example("b", tmp_path / "c.mp4")]
    with pytest.raises(ValueError, match="Two examples have the id 'b'"):
        write_manifest(path, twice)
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": object()}])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
