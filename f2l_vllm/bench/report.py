"""Results for people: one table per suite, in the terminal and as markdown, and sentences on what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from f2l_vllm.evaluation import environment

Result = dict[str, Any]
_MEANING = (
    "[low, high]: 95 % interval, where enough values for one were kept; of medians and percentiles by order statistics"
)
_OF_ROUNDS = ", of ratios by a bootstrap of the rounds"
LEGENDS = {  # what n counts, and how the intervals come about
    "latency": f"n rounds. {_MEANING}{_OF_ROUNDS}.",
    "amortise": f"n rounds, and n answers after the first ones. {_MEANING}.",
    "throughput": f"n answers in all rounds. {_MEANING}, of rates and ratios by Student's t over the rounds.",
    "tax": f"n rounds. {_MEANING}{_OF_ROUNDS}.",
    "ramp": f"n questions. {_MEANING}, of shares by Wilson's method.",
    "capacity": "Counted: exact numbers, which have no interval.",
}
_FEW = (1, 2, 4, 8, 16, 32, 64)


def markdown(result: Result) -> str:
    """Title, machine, table and sentences."""
    header, rows = grid(result)
    lines = [
        f"# {result['suite']}: {model(result)}",
        "",
        f"{where(result)}. `{result['command']}`",
        "",
        *markdown_table(header, rows),
        "",
        LEGENDS[result["suite"]],
        "",
        *(f"- {line}" for line in sentences(result)),
    ]
    return "\n".join(lines) + "\n"


def model(result: Result) -> str:
    """The model that was measured, and in which dtype."""
    configuration = result["configuration"]
    served = configuration["dtype"] == "as served"
    return f"{configuration['model']}{', ' if served else ' in '}{configuration['dtype']}"


def machine(result: Result) -> str:
    """The machine that measured."""
    return environment.name(result["machine"])


def where(result: Result) -> str:
    """Machine, day and versions; of a server that ran already, what it says of itself, and whose machine this is."""
    here = f"{machine(result)}, {result['machine']['memory_gib']:.0f} GiB"
    server, versions = result.get("servers", {}), result["versions"]
    if "url" not in server:
        return f"{here}; {result['date'][:10]}; vLLM {versions['vllm']}, torch {versions['torch']}"
    cached = {"True": "on", "False": "off"}.get(server.get("enable_prefix_caching"), "unknown")
    return (
        f"A server at {server['url']}: f2l-vllm {server['f2l_vllm']}, vLLM {server['vllm']}, prefix cache {cached}. "
        f"Asked from {here}; {result['date'][:10]}"
    )


def table(result: Result) -> Table:
    """The same table for the terminal."""
    header, rows = grid(result)
    shown = Table(title=f"{result['suite']}: {result['configuration']['model']}")
    for place, name in enumerate(header):
        shown.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def grid(result: Result) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    return _GRIDS[result["suite"]](result["rows"])


def sentences(result: Result) -> list[str]:
    """What follows from the rows."""
    return _SENTENCES[result["suite"]](result)


def _latency(rows: list[Result]) -> tuple[list[str], list[list[str]]]:
    header = ["arm", "frames", "resolution", "n", "first token, ms", "p90", "prompt tokens", "state"]
    cells = []
    for row in rows:
        times = row["ttft_ms"] or {}
        figures = [_within(times.get(name), times.get(f"{name}_ci95"), 1) for name in ("median", "p90")]
        where = [row["arm"], str(row["frames"]), f"{row['resolution']} px", _count(times.get("n"))]
        cells.append([*where, *figures, _count(row["prompt_tokens"]), _bytes(row["state_bytes"])])
    return header, cells


def _latency_sentences(result: Result) -> list[str]:
    lines = []
    for ratio in result["ratios"]:
        where = f"{ratio['frames']} frames, {ratio['resolution']} px"
        parts = {"first token": "ttft", "prompt tokens": "prompt_tokens", "state": "state_bytes"}
        told = [
            f"{name} {_times(ratio[key], ratio.get(f'{key}_ci95'))}"
            for name, key in parts.items()
            if ratio[key] is not None
        ]
        if not ratio["arm"].startswith("adapter") or ratio["ttft"] is not None:
            lines.append(f"{ratio['arm']} / adapter, {where}: {', '.join(told)}")
    if any(row["counted"] for row in result["rows"]):
        lines.append("A cell without a time was counted from processor and configuration, not run.")
    return lines


def _amortise(rows: list[Result]) -> tuple[list[str], list[list[str]]]:
    most = len(rows[0]["cumulative_ttft_ms"])
    few = [count for count in _FEW if count <= most]
    header = ["arm", "n", "first question, ms", "n, later", "later ones, ms", *(f"sum of {count}, s" for count in few)]
    cells = []
    for row in rows:
        around = row.get("cumulative_ttft_ci95_ms", [None] * most)
        sums = [_within(row["cumulative_ttft_ms"][count - 1], around[count - 1], 2, 1e3) for count in few]
        first = _within(row["first_ttft_ms"], row.get("first_ttft_ci95_ms"), 1)
        later = row["later_ttft_ms"]
        shown = [_count(later.get("n")), _within(later["median"], later.get("median_ci95"), 1)]
        cells.append([row["arm"], _count(row.get("n")), first, *shown, *sums])
    return header, cells


def _amortise_sentences(result: Result) -> list[str]:
    lines = []
    for one in result["break_even"]:
        if one["questions"] is not None:
            said = f"costs no more from {one['questions']} questions on"
        elif one["projected"] is not None:
            said = f"would cost no more from about {one['projected']} questions on"
        else:
            said = "costs more, however many questions are asked"
        lines.append(f"{one['arm']} against {one['over']}: {said}")
    for row in result["rows"]:
        if row["asked"] < len(row["ttft_ms"]):
            lines.append(f"{row['arm']} was asked {row['asked']} questions; the others are taken to cost their median.")
    return lines


def _throughput(rows: list[Result]) -> tuple[list[str], list[list[str]]]:
    header = ["arm", "popularity", "at a time", "rounds", "n", "requests/s", "goodput/s"]
    header += [f"{name} {p}, ms" for name in ("first token", "per token", "whole") for p in ("p50", "p99")]
    cells = []
    for row in rows:
        counts = [str(row["concurrency"]), _count(len(row["rounds"])), _count(row.get("n"))]
        rates = [
            _within(row.get(name), row.get(f"{name}_ci95"), 3) for name in ("request_throughput", "request_goodput")
        ]
        spread = [
            _within(row.get(f"{p}_{of}_ms"), row.get(f"{p}_{of}_ci95_ms"), 1)
            for of in ("ttft", "tpot", "e2el")
            for p in ("median", "p99")
        ]
        cells.append([row["arm"], row["popularity"], *counts, *rates, *spread])
    return header, cells


def _throughput_sentences(result: Result) -> list[str]:
    return [
        f"adapter / {one['over']}, {one['videos']} videos of {one['frames']} frames, {one['popularity']}, "
        f"{one['concurrency']} at a time: {_times(one['requests'], one.get('requests_ci95'))} the requests per second; "
        f"first token {_times(one['ttft'], one.get('ttft_ci95'))} sooner"
        for one in result["ratios"]
    ]


def _tax(rows: list[Result]) -> tuple[list[str], list[list[str]]]:
    header = ["traffic", "streams", "adapters", "n", "tokens/s", "per token, ms", "first token, ms"]
    cells = []
    for row in rows:
        left_out = () if row["traffic"] == "decode" else ("output_throughput", "median_tpot_ms")
        shown = [
            "–" if name in left_out else _within(row[name], row.get(f"{name}_ci95"), 1)
            for name in ("output_throughput", "median_tpot_ms", "median_ttft_ms")
        ]
        loaded = str(row["adapters"] or "no LoRA")
        cells.append([row["traffic"], str(row["streams"]), loaded, _count(row.get("n")), *shown])
    return header, cells


def _tax_sentences(result: Result) -> list[str]:
    lines = []
    for one in result["ratios"]:
        what = "prefill" if one["traffic"] == "prefill" else f"decode, {one['streams']} streams"
        adapters = f"{one['adapters']} adapters" if one["adapters"] else "no LoRA"
        speed = _within(one["speed"], one.get("speed_ci95"), 4)
        per_token = _within(one.get("decode_speed"), one.get("decode_speed_ci95"), 4)
        more = f" ({per_token} per token)" if "decode_speed" in one else ""
        lines.append(f"{what}, {adapters} / {one['over']}: {speed} of the speed{more}")
    return lines


def _capacity(rows: list[Result]) -> tuple[list[str], list[list[str]]]:
    header = ["frames", "adapter", "KV cache", "videos as adapters", "videos as KV", "KV / adapter"]
    cells = [
        [
            str(row["frames"]),
            _bytes(row["adapter_bytes"]),
            _bytes(row["kv_bytes"]),
            _count(row["adapter_videos"]),
            _count(row["kv_videos"]),
            f"{row['kv_over_adapter']:g}x",
        ]
        for row in rows
    ]
    return header, cells


def _capacity_sentences(result: Result) -> list[str]:
    return [
        f"In {result['configuration']['gb']:g} GB; an adapter is the smaller one from "
        f"{result['larger_from_frames']} frames on."
    ]


def _ramp(rows: list[Result]) -> tuple[list[str], list[list[str]]]:
    header = ["questions/s", "n", "good", "first token, ms", "p99, ms", "failed"]
    cells = []
    for row in sorted(rows, key=lambda row: row["rate"]):
        share = f"{row['share']:.1%} [{', '.join(f'{end:.1%}' for end in row['share_ci95'])}]"
        times = [_within(row.get(f"{p}_ttft_ms"), row.get(f"{p}_ttft_ci95_ms"), 1) for p in ("median", "p99")]
        cells.append([f"{row['rate']:g}", _count(row["n"]), share, *times, _count(sum(row["failures"].values()))])
    return header, cells


def _ramp_sentences(result: Result) -> list[str]:
    limits = ", ".join(f"{name} {ms:g} ms" for name, ms in result["configuration"]["slo"].items() if ms is not None)
    share, best = result["configuration"]["share"], result["highest"]
    if best is None:
        return [f"At no rate were {share:.0%} of the answers good ({limits})."]
    low, high = best["share_ci95"]
    found = f"{best['share']:.1%}, 95 % interval {low:.1%} to {high:.1%}, n = {best['n']}"
    return [
        f"Up to {best['rate']:g} questions a second at least {share:.0%} of the answers are good ({limits}): {found}."
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def _within(value: float | None, interval: Sequence[float | None] | None, digits: int, unit: float = 1) -> str:
    """A figure in multiples of a unit, with its interval if it has one."""
    if value is None:
        return "–"
    ends = [f"{end / unit:,.{digits}f}" for end in interval or () if end is not None]
    return f"{value / unit:,.{digits}f}{f' [{ends[0]}, {ends[1]}]' if len(ends) == 2 else ''}"


def _times(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:g}x" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} B"


_GRIDS = {
    "latency": _latency,
    "amortise": _amortise,
    "throughput": _throughput,
    "tax": _tax,
    "capacity": _capacity,
    "ramp": _ramp,
}
_SENTENCES = {
    "latency": _latency_sentences,
    "amortise": _amortise_sentences,
    "throughput": _throughput_sentences,
    "tax": _tax_sentences,
    "capacity": _capacity_sentences,
    "ramp": _ramp_sentences,
}
