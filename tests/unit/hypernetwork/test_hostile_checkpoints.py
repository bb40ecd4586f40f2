"""Files made to crash, hang or fill the process that reads them are refused in a sentence, at once."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.hypernetwork import pickled, unpickle
from f2l_vllm.hypernetwork.checkpoint import read_checkpoint
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.config_file import read_config
from f2l_vllm.hypernetwork.model import Hypernetwork
from tests.unit.hypernetwork.test_checkpoint import GOLDEN, RECORD, rewrite, text, with_pickle

NESTED = b")" + b"\x85" * 200_000  # a tuple in a tuple in a tuple …
SHARED = b")q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(200))  # 2^200 of them
PAIRS = b"(]" + NESTED + b"K\x01\x86a"  # what dict() would make a dict of, and hash
HOSTILE = {
    "a nested key": (b"}" + NESTED + b"K\x01s", "a tuple for a key"),
    "a nested key among several": (b"}(" + text("x") + b"N" + NESTED + b"K\x01u", "a tuple for a key"),
    "a key that shares its parts": (b"}" + SHARED + b"K\x01s", "a tuple for a key"),
    "a nested key of a record": (RECORD + b")\x81}" + NESTED + b"K\x01sb", "a tuple for a key"),
    "a nested key in a record's arguments": (RECORD + PAIRS + b"tR", "positional argument"),
    "a nested value": (b"}" + text("x") + NESTED + b"s", "nested more than"),
    "a nested persistent id": (NESTED + b"Q", "refers to a storage"),
    "lists in lists": (b"}" + text("x") + b"]" * 200_000 + b"a" * 199_999 + b"s", "nested more than"),
    "as many objects as fit": (b"]" * 3_000_000, "instructions"),
    "a long memo": (b"}r" + struct.pack("<I", 2**24 - 1), "memo"),
}


@pytest.mark.parametrize(("program", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_pickle_is_refused(program: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"(?s)refused, and nothing in it was executed.*({message})"):
        read_checkpoint(with_pickle(tmp_path / "bad.pt", b"\x80\x02" + program + b"."))


def test_a_tensor_that_is_named_often_is_there_once(tmp_path: Path) -> None:
    tensor = torch.zeros(1000)
    torch.save({f"{number}": tensor for number in range(50)}, tmp_path / "many.pt")
    content = unpickle.load(tmp_path / "many.pt", (), ())
    assert len({value.data_ptr() for value in content.values()}) == 1


def test_a_tensor_in_lists_counts_with_all_its_numbers(tmp_path: Path) -> None:
    torch.save({"x": [torch.zeros(30_000)] * 40}, tmp_path / "lists.pt")
    with pytest.raises(ValueError, match="more values"):
        unpickle.load(tmp_path / "lists.pt", (), ())


def test_parts_that_overlap_are_refused(tmp_path: Path) -> None:
    path = rewrite(tmp_path / "bad.pt", lambda name, data: data)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(3):
            again = zipfile.ZipInfo(f"again/{number}")
            of = max(archive.infolist()[:20], key=lambda info: info.file_size)
            again.header_offset, again.CRC = of.header_offset, of.CRC
            again.file_size = again.compress_size = of.file_size
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    with pytest.raises(ValueError, match="overlap"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "by signal 11"),
        ("import sys; sys.exit(1)", "with code 1"),
    ],
)
def test_a_crash_while_reading_is_an_error_message(
    body: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crash.py").write_text(body)
    monkeypatch.setattr(pickled, "__file__", str(tmp_path / "crash.py"))
    with pytest.raises(ValueError, match=f"process that examined it ended {how}"):
        read_checkpoint(GOLDEN)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"rank": 2, "latent_size": 8, "num_blocks": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    config = HypernetworkConfig("base", 2, 8, {"down_proj": (16, 8)}, **sizes)
    Hypernetwork(config).save(tmp_path / "hypernetwork")
    return tmp_path / "hypernetwork"


def test_a_config_nested_without_end_is_refused(directory: Path) -> None:
    shutil.copytree(directory, directory / "model")
    (directory / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        read_config(directory)
    with pytest.raises(ValueError, match="nested too deep"):
        BaseShapes.read(directory)


@pytest.mark.parametrize("change", [{"num_blocks": 10**9}, {"num_pre_head_layers": 5000}, {"rank": 10**4000}])
def test_sizes_that_no_hypernetwork_has_are_refused_before_it_is_built(directory: Path, change: dict[str, int]) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=r"must be an integer|at most 4,096 layers"):
        Hypernetwork.load(directory)


def header(text: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


TENSOR = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
SAFETENSORS = {
    "a header longer than the file": header("{}", 2**63),
    "a header of gigabytes": header("{}", 2**31),
    "a nested header": header('{"a":' * 100_000),
    "tensors that overlap": header(f'{{"a":{TENSOR},"b":{TENSOR}}}') + b"\0" * 8,
    "a tensor beyond the end": header(f'{{"a":{TENSOR.replace("8", "80")}}}') + b"\0" * 8,
    "a shape that overflows": header(f'{{"a":{TENSOR.replace("[2]", f"[{2**62},{2**62}]")}}}') + b"\0" * 8,
    "nothing": b"",
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS.keys())
def test_a_hostile_safetensors_file_is_refused(content: bytes, directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        Hypernetwork.load(directory)
