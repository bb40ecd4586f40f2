"""Writes the flags of the installed vLLM to a file, because building the parser of `vllm serve` takes 17 CPU seconds.

`python -m f2l_vllm.engine.flags_table` writes `flags-0.33.json` or its like, which `engine/flags.py` reads;
`tests/unit/engine/test_flags.py` compares the two, so that another vLLM version fails there first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

from f2l_vllm import torch_shims, vllm_versions
from f2l_vllm.engine.flags import table

# The kind of a flag's values follows from which of these vLLM's own function accepts; other kinds are left to vLLM.
_PROBES = ("7", "0.5", "1k", "word", '{"a": 1}')
_KINDS: dict[tuple[bool, ...], str] = {
    (True, False, False, False, False): "integer",
    (True, True, False, False, False): "number",
    (True, False, True, False, False): "amount",  # an integer that may end in k, M, G …
    (True, True, False, False, True): "json",
}
_BOUNDS = {"ge": "least", "gt": "above", "le": "most", "lt": "below"}


def describe() -> list[dict[str, Any]]:
    """Every flag of vLLM's parser: its names, its destination, the number and the kind of its values."""
    torch_shims.install()
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    room = "launchers" if vllm_versions.installed() == "0.32" else "common"
    arguments = import_module(f"vllm.entrypoints.{room}.cli_args")
    parser = arguments.make_arg_parser(FlexibleArgumentParser(prog="vllm serve", add_help=False))
    bounds = _bounds()
    names: dict[argparse.Action, list[str]] = {}  # also those that an action hides from its help
    for name, action in parser._option_string_actions.items():
        names.setdefault(action, []).append(name)
    return [_flag(action, found, bounds) for action, found in names.items()]


def _flag(action: argparse.Action, names: list[str], bounds: dict[str, dict[str, float]]) -> dict[str, Any]:
    flag: dict[str, Any] = {"names": names, "dest": action.dest}
    if action.nargs == 0:
        off = [name for name in names if _turns_off(action, name)]
        return flag | {"switch": True} | ({"off": off} if off else {})
    flag["values"] = action.nargs
    if action.choices:
        flag["choices"] = [str(choice) for choice in action.choices]
    elif action.type is not None and (kind := _KINDS.get(tuple(_takes(action.type, probe) for probe in _PROBES))):
        flag["kind"] = kind
        if kind != "json" and action.dest in bounds:
            flag |= bounds[action.dest]
    return {name: value for name, value in flag.items() if value is not None}


def _turns_off(action: argparse.Action, name: str) -> bool:
    if not isinstance(action, argparse.BooleanOptionalAction):
        return False
    given = argparse.Namespace()
    action(argparse.ArgumentParser(), given, [], name)
    return getattr(given, action.dest) is False


def _takes(convert: Callable[[str], Any] | Any, text: str) -> bool:
    try:
        convert(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False
    return True


def _bounds() -> dict[str, dict[str, float]]:
    """Limits stated by the fields of vLLM's configurations, if all fields of the same name state the same limits."""
    import vllm.config

    found: dict[str, list[dict[str, float]]] = {}
    for config in vars(vllm.config).values():
        if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
            continue
        for field in dataclasses.fields(config):
            metadata = getattr(field.default, "metadata", [])
            limits = {
                ours: value
                for m in metadata
                for name, ours in _BOUNDS.items()
                if (value := getattr(m, name, None)) is not None
            }
            found.setdefault(field.name, []).append(limits)
    return {name: same[0] for name, same in found.items() if same[0] and all(one == same[0] for one in same)}


if __name__ == "__main__":
    table().write_text("[\n" + ",\n".join(json.dumps(flag) for flag in describe()) + "\n]\n")
