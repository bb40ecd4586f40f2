"""Released checkpoints are read, and nothing in a file that pretends to be one is executed."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from f2l_vllm.hypernetwork.checkpoint import read_checkpoint
from f2l_vllm.hypernetwork.model import Hypernetwork

GOLDEN = Path(__file__).parent / "golden" / "hypernetwork.pt"


def rewrite(target: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """The golden checkpoint with its parts changed, or left out where `change` returns None."""
    with zipfile.ZipFile(GOLDEN) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as copy:
        for name in source.namelist():
            data = change(name.split("/", 1)[1], source.read(name))
            if data is not None:
                copy.writestr(name, data)
    return target


def with_pickle(target: Path, program: bytes) -> Path:
    return rewrite(target, lambda name, data: program if name == "data.pkl" else data)


def patched(target: Path, old: bytes, new: bytes) -> Path:
    """The golden checkpoint with some bytes of its pickle replaced, every time they occur."""

    def change(name: str, data: bytes) -> bytes:
        if name != "data.pkl":
            return data
        assert old in data, old
        return data.replace(old, new)

    return rewrite(target, change)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(module: str, name: str, argument: bytes) -> bytes:
    """Pickle program that calls module.name(argument)."""
    return f"c{module}\n{name}\n".encode() + argument + b"\x85R"


def test_names_prefixed_by_torch_compile_and_other_dtypes_are_read(tmp_path: Path) -> None:
    config, tensors = read_checkpoint(GOLDEN)
    name = b"aggregator.perceiver.encoder.latents_q"
    renamed = b"_orig_mod." + name
    path = patched(
        tmp_path / "compiled.pt",
        b"X" + struct.pack("<I", len(name)) + name,
        b"X" + struct.pack("<I", len(renamed)) + renamed,
    )
    again_config, again = read_checkpoint(path)
    assert again_config == config
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_config_comes_from_the_tensors_and_the_scale_from_the_file() -> None:
    config, tensors = read_checkpoint(GOLDEN)
    assert config.base_model == "tiny/SmolVLM2-golden"
    assert config.modules == {"down_proj": (160, 64)}
    assert (config.num_layers, config.feature_size, config.rank, config.latent_size) == (4, 64, 4, 32)
    assert (config.num_latents, config.num_blocks, config.num_heads, config.num_kv_heads) == (4, 3, 16, 4)
    assert (config.scale, config.max_frames, config.longest_edge) == (16.0, 12, 384)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


MALICIOUS = {
    "os.system": call("os", "system", text("touch {proof}")),
    "posix.system": call("posix", "system", text("touch {proof}")),
    "builtins.eval": call("builtins", "eval", text("open('{proof}', 'w')")),
    "__builtin__.exec": call("__builtin__", "exec", text("open('{proof}', 'w')")),
    "builtins.getattr": b"cbuiltins\ngetattr\n(" + text("a") + text("b") + b"tR",
    "nested attribute": call("collections", "OrderedDict.fromkeys.__self__", text("x")),
    "attribute of a known name": call("torch._utils", "_rebuild_tensor_v2.__globals__", text("x")),
    "another torch function": call("torch", "load", text("{proof}")),
    "another class of the publisher": b"cctx_to_lora.modeling.hypernet\nHyperLoRA\n)\x81",
    "importlib": call("importlib", "import_module", text("antigravity")),
}


@pytest.mark.parametrize("program", MALICIOUS.values(), ids=MALICIOUS.keys())
def test_a_pickle_that_calls_anything_is_refused_and_not_executed(program: bytes, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    wrapped = b"\x80\x02" + _fill(program, str(proof)) + b"."
    with pytest.raises(ValueError, match=r"refused, and nothing in it was executed: it asks for"):
        read_checkpoint(with_pickle(tmp_path / "bad.pt", wrapped))
    assert not proof.exists()


def _fill(program: bytes, proof: str) -> bytes:
    """Put the path into the texts of a program, with their lengths."""
    for template in ("touch {proof}", "open('{proof}', 'w')", "{proof}"):
        program = program.replace(text(template), text(template.format(proof=proof)))
    return program


def test_the_malicious_pickles_do_work_when_nothing_guards_them(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    pickle.loads(b"\x80\x02" + _fill(MALICIOUS["posix.system"], str(proof)) + b".")
    assert proof.exists()


def test_a_reduce_hidden_deep_in_a_config_is_refused(tmp_path: Path) -> None:
    path = patched(tmp_path / "bad.pt", b"cpeft.utils.peft_types\nPeftType\n", b"cposix\nsystem\n")
    with pytest.raises(ValueError, match=r"posix\.system"):
        read_checkpoint(path)


RECORD = b"cpeft.tuners.lora.config\nLoraConfig\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
TAMPERING = {
    "slots of a record": RECORD + b")\x81N}" + text("__class__") + text("x") + b"s\x86b",
    "a state that is no dict": RECORD + b")\x81" + text("x") + b"b",
    "attributes of the record class": RECORD + b"}" + text("__setstate__") + text("x") + b"sb",
    "defaults of a function": REBUILD + b"N}" + text("__defaults__") + b")s\x86b",
    "attributes of a storage type": b"ctorch\nFloatStorage\n}" + text("dtype") + text("x") + b"sb",
    "other attributes of the state dict": b"ccollections\nOrderedDict\n)R}" + text("keys") + text("x") + b"sb",
    "a function as a value": b"}" + text("x") + REBUILD + b"s",
    "a call without arguments": REBUILD + b")R",
    "a storage that is none": REBUILD + b"(" + text("x") + b"K\x00K\x01\x85K\x01\x85\x89}tR",
    "a number as a persistent id": b"K\x01Q",
}


@pytest.mark.parametrize("program", TAMPERING.values(), ids=TAMPERING.keys())
def test_known_objects_cannot_be_changed_or_misused(program: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused, and nothing in it was executed"):
        read_checkpoint(with_pickle(tmp_path / "bad.pt", b"\x80\x02" + program + b"."))
    assert read_checkpoint(GOLDEN)[0].rank == 4, "the reader itself was changed"


OPCODES = {
    "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93.",
    "INST": b"\x80\x02(ios\nsystem\n.",
    "EXT1": b"\x80\x02\x82\x01.",
    "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 4) + b"abcd.",
    "BINBYTES": b"\x80\x03B" + struct.pack("<I", 1) + b"x.",
    "PERSID": b"\x80\x02Pstorage\n.",
    "FROZENSET": b"\x80\x04(\x91.",
}


@pytest.mark.parametrize(("name", "program"), OPCODES.items(), ids=OPCODES.keys())
def test_pickle_instructions_that_torch_does_not_write_are_refused(name: str, program: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"pickle instruction {name}"):
        read_checkpoint(with_pickle(tmp_path / "bad.pt", program))


def test_a_memo_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    program = b"\x80\x02}r" + struct.pack("<I", 2**31) + b"."
    with pytest.raises(ValueError, match="memo"):
        read_checkpoint(with_pickle(tmp_path / "bad.pt", program))


def test_values_that_share_parts_and_unfold_without_end_are_refused(tmp_path: Path) -> None:
    doubled = b"]q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    with pytest.raises(ValueError, match="more values"):
        read_checkpoint(with_pickle(tmp_path / "bad.pt", b"\x80\x02}" + text("x") + doubled + b"s."))


STORAGES = {
    "shorter than claimed": lambda name, data: data[:-4] if name == "data/0" else data,
    "longer than claimed": lambda name, data: data + b"\0" * 4 if name == "data/0" else data,
    "missing": lambda name, data: None if name == "data/0" else data,
}


@pytest.mark.parametrize("change", STORAGES.values(), ids=STORAGES.keys())
def test_storages_of_another_size_are_refused(change: Callable[[str, bytes], bytes | None], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"):
        read_checkpoint(rewrite(tmp_path / "bad.pt", change))


GEOMETRY = {
    "a tensor longer than its storage": (b"K\x00M\x00\x01K@\x86q\x09", b"K\x00M\x01\x01K@\x86q\x09"),
    "an offset beyond the storage": (b"K\x00M\x00\x01K@\x86q\x09", b"K\x01M\x00\x01K@\x86q\x09"),
    "overlapping strides": (b"K@K\x01\x86q\x0a", b"K\x01K\x01\x86q\x0a"),
    "a negative size": (b"K\x00M\x00\x01K@\x86q\x09", b"K\x00J\xff\xff\xff\xffK@\x86q\x09"),
    "a storage length in the id": (b"M\x00@tq\x08", b"M\x01@tq\x08"),
}


@pytest.mark.parametrize(("old", "new"), GEOMETRY.values(), ids=GEOMETRY.keys())
def test_tensors_reaching_outside_their_storage_are_refused(old: bytes, new: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"):
        read_checkpoint(patched(tmp_path / "bad.pt", old, new))


def test_compressed_parts_are_refused_so_that_a_small_file_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(GOLDEN) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in source.namelist():
            copy.writestr(name, source.read(name))
    with pytest.raises(ValueError, match="compressed"):
        read_checkpoint(path)


def test_a_file_cut_short_or_of_another_kind_is_explained(tmp_path: Path) -> None:
    (tmp_path / "cut.pt").write_bytes(GOLDEN.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cut short"):
        read_checkpoint(tmp_path / "cut.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list instead of a dict"):
        read_checkpoint(tmp_path / "list.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a Frames2LoRA checkpoint"):
        read_checkpoint(tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ValueError, match="torch's zip format"):
        read_checkpoint(tmp_path / "zip.pt")


CONTRADICTIONS = {
    "rank": (text("r") + b"rD\x02\x00\x00K\x04", text("r") + b"rD\x02\x00\x00K\x05", "lora_config.r is 5"),
    "module": (text("down_proj") + b"rH", text("gate_proj") + b"rH", "lora_config.target_modules"),
}


@pytest.mark.parametrize(("old", "new", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_config_that_contradicts_the_tensors_is_refused(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_checkpoint(patched(tmp_path / "bad.pt", old, new))


def test_an_architecture_that_is_not_computed_here_is_refused_by_name(tmp_path: Path) -> None:
    old = text("use_token_mixing") + b"r3\x02\x00\x00\x89"
    with pytest.raises(ValueError, match="use_token_mixing = True"):
        read_checkpoint(patched(tmp_path / "bad.pt", old, old[:-1] + b"\x88"))


def test_missing_unused_and_misshapen_tensors_are_refused_by_name(tmp_path: Path) -> None:
    config, tensors = read_checkpoint(GOLDEN)
    with pytest.raises(ValueError, match=r"head\.weight is missing"):
        Hypernetwork.from_tensors(config, {n: t for n, t in tensors.items() if n != "head.weight"})
    with pytest.raises(ValueError, match="extra is not part of a hypernetwork"):
        Hypernetwork.from_tensors(config, tensors | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"head\.weight has shape \[1\]"):
        Hypernetwork.from_tensors(config, tensors | {"head.weight": torch.zeros(1)})
    old, new = text("layers.0.mlp.0.bias"), text("layers.0.mlp.9.bias")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.0\.bias is missing"):
        Hypernetwork.load(patched(tmp_path / "bad.pt", old, new))


def test_reading_imports_neither_the_publishers_package_nor_peft() -> None:
    code = (
        "import sys; from f2l_vllm.hypernetwork.model import Hypernetwork; "
        f"Hypernetwork.load({str(GOLDEN)!r}); "
        "print([n for n in ('peft', 'ctx_to_lora', 'vllm', 'ray') if n in sys.modules])"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env, check=True
    )
    assert done.stdout.strip() == "[]"
