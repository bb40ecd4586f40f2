"""What LoRA costs: the same text traffic on a server without it and on one with many adapters."""

from __future__ import annotations

import asyncio
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.bench import suite as suites
from f2l_vllm.bench import vllm_client
from f2l_vllm.bench.arms import ServerKind
from f2l_vllm.bench.costs import Costs, write_adapter
from f2l_vllm.bench.intervals import of_each, of_quantile, of_ratio
from f2l_vllm.bench.results_file import ResultsFile, Row, Say
from f2l_vllm.bench.servers import ENGINE_ENV, EngineProcess, Server, Servers, engine_share
from f2l_vllm.bench.shapes import Subject
from f2l_vllm.engine import tuned, tuning
from f2l_vllm.evaluation.percentiles import is_carried
from f2l_vllm.hypernetwork.config_file import read_config
from f2l_vllm.hypernetwork.ranks import smallest_rank
from f2l_vllm.server_process import ServerProcess

_NAME = "base"
_FIGURES = ("output_throughput", "request_throughput", "total_input_tokens", "total_output_tokens")
_TIMES = ("ttft", "tpot", "itl", "e2el")


def figures(requests: int) -> tuple[str, ...]:
    """The keys of vLLM's that are kept of so many requests."""
    carried = [f"p{p}" for p in (90, 99) if is_carried(p, requests)]
    return _FIGURES + tuple(f"{spread}_{of}_ms" for of in _TIMES for spread in ("mean", "median", *carried))


async def run(suite: suites.Tax, subject: Subject, folder: Path, results: ResultsFile, say: Say) -> None:
    """Measure all cells; in every round of a cell the numbers of adapters take turns.

    Rows hold vLLM's keys with medians over rounds, and each round in `rounds`; `traffic` is `decode` or `prefill`.

    Raises:
        TrafficFailed: a server did not answer as asked.
        ServerFailed: a server did not start.
        ValueError: kernels cannot be tuned here.
    """
    costs = Costs(subject)
    rank = suite.rank or costs.rank
    names = _adapters(subject, folder / f"adapters-{subject.name}-rank-{rank}", max(suite.adapters), rank)
    log = folder / "vllm-bench.log"
    without = ServerKind(_flags(suite, costs))
    with_lora = ServerKind((*without.flags, *_lora_flags(subject, names, rank)))

    env = ENGINE_ENV
    if suite.tuned:
        env = env | await asyncio.to_thread(tuned_kernels, subject, len(names), rank, folder / "lora-kernels", say)

    async def traffic(url: str, adapters: int, **what: int) -> dict[str, Any]:
        found = await vllm_client.random_text(
            url, _NAME, subject.directory, adapters=list(names)[:adapters], log=log, **what
        )
        return {name: found[name] for name in figures(what["requests"])}

    async def warm(kind: ServerKind, server: Server) -> None:
        most = max(suite.adapters) if kind == with_lora else 0
        await traffic(server.url, most, input_tokens=suite.prefill_tokens, output_tokens=1, requests=2, concurrency=1)
        await traffic(server.url, most, input_tokens=16, output_tokens=2, requests=max(1, most), concurrency=8)

    def start(kind: ServerKind) -> ServerProcess:
        more = [word for flag in suite.serve_flags for word in shlex.split(flag)]
        share = engine_share(suite.servers_at_once)
        return EngineProcess(str(subject.directory), folder / "engine", *kind.flags, *share, *more, env=env)

    together = suite.servers_at_once > 1
    results.note(
        servers={
            "flags_of_all": without.flags,
            "rank": rank,
            "alternation": "servers run together" if together else "servers take turns, each started anew",
        }
    )
    servers = Servers(start, suite.servers_at_once, warm)
    try:
        for cell in cells(suite):
            counts = [count for count in adapters_of(suite, cell) if not results.has(**cell, adapters=count)]
            if not counts:
                continue
            await servers.prepare([with_lora if count else without for count in counts])
            measured: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
            for number in range(suite.rounds):
                turn = number % len(counts)
                for count in counts[turn:] + counts[:turn]:
                    server = await servers.get(with_lora if count else without)
                    what = _traffic(suite, cell) | {"seed": suite.seed + number}
                    measured[count].append(await traffic(server.url, count, **what))
                    say(f"{_said(cell)}, {count or 'no'} adapters: {_figure(cell, measured[count][-1])}")
            results.add(*({**cell, "adapters": count, **_medians(some)} for count, some in measured.items()))
    finally:
        servers.close()


def cells(suite: suites.Tax) -> list[dict[str, Any]]:
    """The cells, each measured with every number of adapters."""
    decode = [{"traffic": "decode", "streams": streams} for streams in suite.streams]
    return [{"traffic": "prefill", "streams": 1}, *decode]


def adapters_of(suite: suites.Tax, cell: dict[str, Any]) -> list[int]:
    """Numbers of adapters that a cell's streams can use; a single prompt has at most one."""
    return [count for count in suite.adapters if count <= cell["streams"]]


def derive(rows: list[Row]) -> dict[str, Any]:
    """`rows` with `n` rounds and the interval of every figure; `ratios`: speed with LoRA over speed without it, higher
    is better; and many streams over one. Each ratio has its interval, over paired rounds where the servers took turns.
    """
    rows = [row | (of_each(row["rounds"], of_quantile) if "rounds" in row else {}) for row in rows]
    base = {(row["traffic"], row["streams"]): row for row in rows if row["adapters"] == 0}
    single = {bool(row["adapters"]): row for row in rows if row["traffic"] == "decode" and row["streams"] == 1}
    ratios = []
    for row in rows:
        cell = {name: row[name] for name in ("traffic", "streams", "adapters")}
        without = base.get((row["traffic"], row["streams"]))
        if row["adapters"] and without:
            if row["traffic"] == "prefill":
                figures = _ratio("speed", without, row, "median_ttft_ms")
            else:
                figures = _ratio("speed", row, without, "output_throughput")
                figures |= _ratio("decode_speed", without, row, "median_tpot_ms")
            ratios.append({**cell, "over": "no LoRA", **figures})
        alone = single.get(bool(row["adapters"]))
        if row["traffic"] == "decode" and row["streams"] > 1 and alone:
            figures = _ratio("speed", row, alone, "output_throughput", paired=False)
            ratios.append({**cell, "over": "one stream", **figures})
    return {"rows": rows, "ratios": ratios}


def _ratio(name: str, row: Row, other: Row, figure: str, paired: bool = True) -> dict[str, Any]:
    mine, theirs = ([one[figure] for one in some.get("rounds", ())] for some in (row, other))
    return {name: round(row[figure] / other[figure], 4), f"{name}_ci95": of_ratio(mine, theirs, paired)}


def _traffic(suite: suites.Tax, cell: dict[str, Any]) -> dict[str, int]:
    if cell["traffic"] == "prefill":
        return {
            "input_tokens": suite.prefill_tokens,
            "output_tokens": 1,
            "requests": suite.prefill_requests,
            "concurrency": 1,
        }
    return {
        "input_tokens": suite.input_tokens,
        "output_tokens": suite.output_tokens,
        "requests": cell["streams"],
        "concurrency": cell["streams"],
    }


def _flags(suite: suites.Tax, costs: Costs) -> tuple[str, ...]:
    """Flags of both servers."""
    longest = max(suite.prefill_tokens + 1, suite.input_tokens + suite.output_tokens)
    length = -(-(longest + 1) // 256) * 256
    streams = max(suite.streams)
    tokens = streams * (suite.input_tokens + suite.output_tokens + 64) + length  # 64: the last block of each stream
    kv = suite.kv_gib * 2**30 if suite.kv_gib else max(256 << 20, tokens * costs.kv_bytes_per_token)
    return (
        *("--served-model-name", _NAME),
        *("--dtype", costs.dtype),
        *("--max-model-len", str(length)),
        *("--max-num-seqs", str(streams)),
        *("--kv-cache-memory-bytes", str(int(kv))),
        "--no-enable-prefix-caching",
    )


def _lora_flags(subject: Subject, names: dict[str, Path], rank: int) -> tuple[str, ...]:
    return (
        "--enable-lora",
        *("--max-lora-rank", str(smallest_rank(rank))),
        *("--max-loras", str(len(names))),
        *("--max-cpu-loras", str(len(names))),
        *("--lora-target-modules", *sorted(read_config(subject.hypernetwork).modules)),
        *("--lora-modules", *(f"{name}={path}" for name, path in names.items())),
    )


def tuned_kernels(
    subject: Subject,
    slots: int,
    rank: int,
    folder: Path,
    say: Say,
    timer: Callable[[tuned.Product], tuning.Time] | None = None,
) -> dict[str, str]:
    """The variable that names the kernels' files to vLLM, once this GPU is tuned.

    Args:
        timer: makes what measures a product; None: vLLM's kernels.

    Raises:
        ValueError: there is no GPU, or vLLM merges the linears that adapters change.
    """
    if not torch.cuda.is_available():
        raise ValueError("tuned: vLLM's LoRA kernels run on a GPU, and there is none: leave it out")
    shapes = BaseShapes.read(subject.directory).modules
    modules = {name: shapes[name] for name in read_config(subject.hypernetwork).modules}
    wanted = tuned.products(modules, slots, smallest_rank(rank) or rank)
    if wanted is None:
        raise ValueError(f"tuned: vLLM merges some of {', '.join(modules)}, and takes no files for those: leave it out")
    tuning.tune(folder, torch.cuda.get_device_name(), wanted, say, timer)
    torch.cuda.empty_cache()  # the servers get it
    return {tuned.VARIABLE: str(folder)}


def _adapters(subject: Subject, folder: Path, count: int, rank: int) -> dict[str, Path]:
    """Random adapters by name, written if they do not exist yet."""
    found = {f"adapter-{number}": folder / str(number) for number in range(count)}
    for number, path in enumerate(found.values()):
        if not path.is_dir():
            write_adapter(subject, path, rank, seed=number)
    return found


def _medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    medians = {name: round(statistics.median(one[name] for one in rounds), 4) for name in rounds[0]}
    return medians | {"rounds": [{name: round(value, 4) for name, value in one.items()} for one in rounds]}


def _said(cell: dict[str, Any]) -> str:
    return "prefill" if cell["traffic"] == "prefill" else f"decode, {cell['streams']} streams"


def _figure(cell: dict[str, Any], found: dict[str, Any]) -> str:
    if cell["traffic"] == "prefill":
        return f"first token after {found['median_ttft_ms']:.0f} ms"
    return f"{found['output_throughput']:.1f} tokens/s"
