"""Reads the flags of `vllm serve` like vLLM, but without loading it, so that mistakes are reported at once.

`flags-0.32.json` and its like hold the flags of each vLLM that this package supports (`flags_table` writes them).
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import yaml

from f2l_vllm import vllm_versions

_AMOUNT = re.compile(r"(\d+)([kmgtKMGT])?|(\d+\.\d+)([kmgt])")
_UNITS = "kmgt"
_VALUE = "\0"  # marks a value in an error message: argparse puts the flag's name and a colon before it


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument ").replace(f": {_VALUE}", " "))


def read(words: Sequence[str], own: Collection[str] = ()) -> Namespace:
    """The flags given in a command line, under vLLM's names for their values, and nothing else.

    `model_tag` is the model, if one is named. The entries of `--config` count as flags, as they do for vLLM.

    Args:
        words: of the command line, after `vllm serve`.
        own: flags that are not vLLM's, but that the user may have meant.

    Raises:
        ValueError: a flag is unknown or vLLM does not accept its value; the message says which, in one sentence.
    """
    parser = _parser()
    words = [*_config(words, parser), *words]
    found, unknown = parser.parse_known_args(_plain(words, parser))
    for word in unknown:
        if word.startswith("-"):
            raise ValueError(_unknown(word.split("=")[0], [*own, *parser._option_string_actions]))
    if unknown:
        raise ValueError(f"{unknown[0]!r} belongs to no flag: the command takes one model, and flags")
    return found


def _unknown(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word.replace("_", "-"), known, 1, 0.7)
    hint = f"did you mean {close[0]}?" if close else "'f2l-vllm serve --help' has this server's, --help=all vLLM's."
    return f"{word} is no flag of f2l-vllm serve or vllm serve: {hint}"


def without_model(words: Sequence[str], model: str) -> list[str]:
    """The words of a command line without the model that it names."""
    for index, word in enumerate(words):
        if word == model:
            rest = [*words[:index], *words[index + 1 :]]
            if "model_tag" not in vars(_parser().parse_known_args(_plain(rest, _parser()))[0]):
                return rest
    return list(words)


def table() -> Path:
    """The installed vLLM's flags.

    Raises:
        ValueError: this package does not run with it.
    """
    return Path(__file__).with_name(f"flags-{vllm_versions.installed()}.json")


@cache
def _parser() -> _Parser:
    parser = _Parser(prog="vllm serve", add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("model_tag", nargs="?")
    for flag in json.loads(table().read_text()):
        options: dict[str, Any] = {"dest": flag["dest"]}
        if flag.get("switch"):
            off = flag.get("off", [])
            parser.add_argument(*(name for name in flag["names"] if name not in off), action="store_true", **options)
            if off:
                parser.add_argument(*off, action="store_false", **options)
            continue
        if "values" in flag:
            options["nargs"] = flag["values"]
        convert = _converter(flag)
        parser.add_argument(*flag["names"], type=convert, **options)
    return parser


def _converter(flag: dict[str, Any]) -> Callable[[str], Any]:
    kind, choices = flag.get("kind"), flag.get("choices")

    def convert(text: str) -> Any:
        if choices is not None:
            if text not in choices and text != "None":
                raise _wrong(text, f"give one of {', '.join(choices)}")
            return None if text == "None" else text
        if kind is None:
            return text
        if text in ("", "None"):
            return None
        if kind == "json":
            try:
                return json.loads(text)
            except ValueError as error:
                raise _wrong(text, f"no JSON ({error})") from error
        value = _NUMBERS[kind](text)
        for name, says, holds in _LIMITS:
            if name in flag and not holds(value, flag[name]):
                raise _wrong(text, f"must be {says} {flag[name]:g}")
        return value

    return convert


_LIMITS: list[tuple[str, str, Callable[[float, float], bool]]] = [
    ("least", "at least", lambda value, limit: value >= limit),
    ("above", "above", lambda value, limit: value > limit),
    ("most", "at most", lambda value, limit: value <= limit),
    ("below", "below", lambda value, limit: value < limit),
]


def _wrong(text: str, why: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"{_VALUE}{text}: {why}")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise _wrong(text, "no whole number") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise _wrong(text, "no number") from error


def _amount(text: str) -> int:
    """Like vLLM: 1k is 1,000, 1K is 1,024, and only the former may have decimals; `auto` is -1."""
    if text in ("auto", "-1"):
        return -1
    if (match := _AMOUNT.fullmatch(text.strip())) is None:
        raise _wrong(text, "no whole number, nor one like 25.6k")
    number, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    if unit is None:
        return int(number)
    power = _UNITS.index(unit.lower()) + 1
    return int(float(number) * 1000**power) if unit.islower() else int(number) * 1024**power


_NUMBERS: dict[str, Callable[[str], float]] = {"integer": _integer, "number": _number, "amount": _amount}


def _plain(words: Sequence[str], parser: _Parser) -> list[str]:
    """Words as `argparse` takes them: with dashes in names, and without fields of JSON flags (`--flag.field 1`)."""
    plain: list[str] = []
    rest = iter(words)
    for word in rest:
        name, sign, value = word.partition("=")
        if re.match(r"-O(\d|=|[a-z])", word):
            plain += ["--optimization-level", word[2:].removeprefix("=")]
        elif word == "-O":
            plain.append("--optimization-level")
        elif not word.startswith("-"):
            plain.append(word)
        elif name.startswith("-") and "." in name and not re.match(r"-[\d.]", name):
            base = name.split(".")[0].replace("_", "-")
            base = base if not base.startswith("-") or base.startswith("--") else "-" + base.lstrip("-")
            if base not in parser._option_string_actions:
                raise ValueError(_unknown(base, list(parser._option_string_actions)))
            if not sign:
                next(rest, None)
        elif word.startswith("--"):
            plain.append(name.replace("_", "-") + sign + value)
        else:
            plain.append(word)
    return plain


def _config(words: Sequence[str], parser: _Parser) -> list[str]:
    """The entries of the YAML file that `--config` names, as flags."""
    if "--config" not in words:
        return []
    index = list(words).index("--config")
    if index + 1 == len(words):
        raise ValueError("--config: expected a YAML file")
    path = Path(words[index + 1])
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if path.suffix not in (".yaml", ".yml") or not isinstance(entries, dict):
        raise ValueError(f"--config {path} is no YAML file of flags and their values")
    flags: list[str] = []
    for key, value in entries.items():
        name = f"--{key}"
        if isinstance(value, bool):
            off = f"--no-{key}"
            flags += [name] if value else [off] * (off in parser._option_string_actions)
        elif isinstance(value, list):
            flags += [name, *map(str, value)] if value else []
        else:
            flags += [name, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
