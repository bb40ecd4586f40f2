"""Tar files of videos train as the same videos in a manifest do, from a disk and from a web server."""

import json
import tarfile
from pathlib import Path

import pytest

from f2l_vllm.train.data import shards
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.train.data.shards import expand, read_examples, read_shards, video_file
from tests.support.tars import add, running_site, write_shards


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    """Two questions about each of three files that are no videos, as nothing decodes them here."""
    made = []
    for number in range(3):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(bytes([number]) * (200_000 + number))
        made += [
            Example(f"{number}-{n}", path, f"What {n}?", "This.", "caption", "d", "train", {"start": n, "end": n + 1})
            for n in range(2)
        ]
    return made


def contents(examples: list[Example]) -> list[bytes]:
    found = []
    for example in examples:
        with video_file(example) as path:
            assert path.suffix == ".mp4"
            found.append(path.read_bytes())
    return found


def asked(examples: list[Example]) -> list[tuple]:
    return [(one.id, one.prompt, one.target_text, one.dataset, one.split, one.span) for one in examples]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{x,y}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]),
    ],
)
def test_braces_count_and_choose(pattern: str, names: list[str]) -> None:
    assert expand(pattern) == names


def test_braces_that_are_neither_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\{0-9\} is no range"):
        expand("a-{0-9}.tar")


def test_examples_and_videos_are_those_of_the_files(examples: list[Example], tmp_path: Path) -> None:
    found = read_examples(str(tmp_path / write_shards(tmp_path, examples, 2)))
    assert asked(found) == asked(examples)
    assert contents(found) == contents(examples)


def test_a_web_server_gives_the_texts_first_and_then_one_video_at_a_time(
    examples: list[Example], tmp_path: Path
) -> None:
    pattern = write_shards(tmp_path, examples, 2)
    with running_site(tmp_path) as site:
        found = read_examples(f"{site.url}/{pattern}")
        assert asked(found) == asked(examples)
        read = sum(end - first for _, first, end in site.parts)
        assert read < 300_000, "of 600 KB of videos, most is passed over"
        del site.parts[:]
        assert contents(found[2:3]) == contents(examples[2:3])
        assert [end - first for _, first, end in site.parts] == [200_001]


def test_a_server_that_fails_now_and_then_is_asked_again(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_WAITS_S", (0.0, 0.0))
    pattern = write_shards(tmp_path, examples, 2)
    with running_site(tmp_path) as site:
        found = read_examples(f"{site.url}/{pattern}")
        site.broken = 2
        assert contents(found[:1]) == contents(examples[:1])
        site.broken = 3
        with pytest.raises(ValueError, match="the same command goes on"):
            contents(found[:1])
        site.broken, site.whole = 0, True
        with pytest.raises(ValueError, match="it has changed, or cannot give a part"):
            contents(found[:1])


def test_a_tar_file_that_has_been_changed_is_noticed(examples: list[Example], tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, examples, 3)
    found = read_examples(str(tmp_path / pattern))
    (tmp_path / "shard-000.tar").write_bytes(b"short")
    with pytest.raises(ValueError, match="it has changed"):
        contents(found[-1:])


def test_what_may_be_left_out_has_a_value_and_a_split_is_chosen(tmp_path: Path, caplog) -> None:
    row = {"prompt": "What?", "target_text": "This.", "task_type": "caption"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "in/b.mp4", b"b")
        add(tar, "in/b.json", json.dumps(row).encode())
        add(tar, "c.webm", b"c")
        add(tar, "c.json", json.dumps([row, row | {"split": "test"}]).encode())
        add(tar, "alone.mp4", b"d")
        add(tar, "c.txt", b"e")
    found = read_shards(str(tmp_path / "a.tar"))
    assert [(one.id, one.split) for one in found] == [("a/in/b", "train"), ("a/c-0", "train"), ("a/c-1", "test")]
    assert "left out, with no video or no JSON file of the name: alone" in caplog.text
    assert [one.id for one in read_shards(str(tmp_path / "a.tar"), "test")] == ["a/c-1"]
    with pytest.raises(ValueError, match="no example of split 'other'"):
        read_shards(str(tmp_path / "a.tar"), "other")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"b\.json: not JSON"),
        ("3", r"b\.json: neither an object nor a list"),
        ('{"prompt": "What?"}', r"b\.json: field target_text: missing"),
        ('{"prompt": "a", "target_text": "b", "task_type": "c", "anwser": ""}', r"b\.json: field anwser: unknown"),
        ("[]", "holds no example"),
    ],
)
def test_texts_that_are_no_examples_are_named(tmp_path: Path, text: str, said: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "b.mp4", b"b")
        add(tar, "b.json", text.encode())
    with pytest.raises(ValueError, match=said):
        read_shards(str(tmp_path / "a.tar"))


def test_a_file_that_is_no_plain_tar_file_is_refused(examples: list[Example], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.tar cannot be read"):
        read_shards(str(tmp_path / "none.tar"))
    with tarfile.open(tmp_path / "zip.tar", "w:gz") as tar:
        add(tar, "b.mp4", b"b")
    write_shards(tmp_path, examples, 3)
    whole = (tmp_path / "shard-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    for name in ("zip.tar", "cut.tar"):
        with pytest.raises(ValueError, match="no plain tar file, or is cut off"):
            read_shards(str(tmp_path / name))


def test_a_repeated_id_is_refused(examples: list[Example], tmp_path: Path) -> None:
    write_shards(tmp_path, examples, 3)
    (tmp_path / "shard-001.tar").write_bytes((tmp_path / "shard-000.tar").read_bytes())
    with pytest.raises(ValueError, match="two examples have the id '0-0'"):
        read_shards(str(tmp_path / "shard-{000,001}.tar"))
