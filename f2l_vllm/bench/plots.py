"""Pictures of results, PNG: heat maps over frames and resolution, amortisation, throughput, the tax, capacity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from f2l_vllm.bench import report
from f2l_vllm.evaluation.plots import style

Result = dict[str, Any]
# An arm has the same colour and marker in every picture.
_ARMS = ("adapter", "frames", "frames-cached", "adapter-cold", "frames-merged", "adapter-merged", "text")
_ARMS_THAT_DIFFER = ("adapter", "frames", "frames-merged")  # in counted quantities
_NAMES = {
    "adapter": "adapter, ready",
    "adapter-cold": "adapter, first question",
    "adapter-merged": "adapter, first question, merged",
    "frames": "frames in context",
    "frames-cached": "frames, prefix cached",
    "frames-merged": "frames, merged",
    "text": "question alone",
}


def plot(result: Result, folder: Path) -> list[Path]:
    """Draw a result."""
    match result["suite"]:
        case "latency":
            pictures = {"latency-heat-maps": _heat_maps, "latency": _lines, "first-token": _first_token}
            return [draw(result, folder / f"{name}.png") for name, draw in pictures.items()]
        case "amortise":
            return [_amortise(result, folder / "amortise.png")]
        case "throughput":
            return [_throughput(result, folder / "throughput.png")]
        case "tax":
            return [_tax(result, folder / "tax.png")]
        case "ramp":
            return [_ramp(result, folder / "ramp.png")]
        case _:
            return [_capacity(result, folder / "capacity.png")]


def _heat_maps(result: Result, path: Path) -> Path:
    """First token of every arm, and the ratio of each rival's to the adapter's."""
    timed = [row for row in result["rows"] if row["ttft_ms"] is not None] or result["rows"]
    frames, edges = (sorted({row[name] for row in timed}) for name in ("frames", "resolution"))
    arms = [arm for arm in _ARMS if any(row["arm"] == arm for row in timed)]
    ratios = [r | {"value": r["ttft"]} for r in result["ratios"] if r["ttft"] is not None]
    rivals = [arm for arm in arms if any(ratio["arm"] == arm for ratio in ratios)]
    of = style.figure(1.5 + len(arms) * max(2.6, 1.0 + 0.8 * len(frames)), 2.2 + 2 * (1.1 + 0.45 * len(edges)))
    panels = of.subplots(2, len(arms), squeeze=False)
    times = [row | {"value": (row["ttft_ms"] or {}).get("median")} for row in timed]
    for column, arm in enumerate(arms):
        _heat_map(panels[0][column], times, arm, frames, edges, _NAMES[arm], "first token, ms")
        if arm in rivals:
            _heat_map(panels[1][column], ratios, arm, frames, edges, "", "times the adapter's")
        else:
            panels[1][column].set_axis_off()
        if column == 0:
            panels[0][column].set_ylabel("longest edge")
    style.title(of, "Time to the first token over frames and resolution", _details(result))
    return style.save(of, path)


def _heat_map(
    at: Axes, rows: list[Result], arm: str, frames: list[int], edges: list[int], name: str, quantity: str
) -> None:
    cells = {(row["resolution"], row["frames"]): row["value"] for row in rows if row["arm"] == arm}
    every = [row["value"] for row in rows if row["value"]]
    norm = LogNorm(min(every, default=1.0) / 1.01, max(every, default=1.0) * 1.01)
    style.heat_map(at, cells, frames, edges, norm, lambda value: f"{value:.3g}" if value < 1000 else f"{value:,.0f}")
    at.set_title(f"{name}\n{quantity}" if name else quantity, loc="left", fontsize=10)
    at.set_xlabel("frames")


_FIRST_TOKEN = "first token, ms"
_QUANTITIES: dict[str, Callable[[Result], float | None]] = {
    _FIRST_TOKEN: lambda row: (row["ttft_ms"] or {}).get("median"),
    "prompt tokens": lambda row: row["prompt_tokens"],
    "state of a video, MB": lambda row: (row["state_bytes"] or 0) / 1e6 or None,
}


def _lines(result: Result, path: Path) -> Path:
    """First token, prompt tokens and state over frames, at the first resolution."""
    of = style.figure(13, 4.4)
    panels = of.subplots(1, 3)
    for at, name in zip(panels, _QUANTITIES, strict=True):
        _over_frames(at, result, name, _ARMS if name == _FIRST_TOKEN else _ARMS_THAT_DIFFER)
    edge = result["rows"][0]["resolution"]
    style.title(of, "What a question about a video costs", f"{_details(result)}; file of {edge} px")
    style.legend(of, panels[0])
    return style.save(of, path)


def _first_token(result: Result, path: Path) -> Path:
    """First token over frames for the three ways of answering about a known video, at the first resolution."""
    of = style.figure(8, 4)
    at = of.subplots()
    _over_frames(at, result, _FIRST_TOKEN, ("frames", "frames-cached", "adapter"))
    style.title(of, "Time to the first token of an answer", _details(result))
    style.legend(of, at)
    return style.save(of, path)


def _over_frames(at: Axes, result: Result, name: str, arms: Sequence[str]) -> None:
    value, edge = _QUANTITIES[name], result["rows"][0]["resolution"]
    rows = [row for row in result["rows"] if row["resolution"] == edge and value(row) is not None]
    for arm in arms:
        points = sorted((row["frames"], value(row)) for row in rows if row["arm"] == arm)
        if points:
            _line(at, arm, *zip(*points, strict=True))
    at.set_xscale("log", base=2)
    at.set_yscale("log")
    at.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    style.plain_ticks(at.yaxis)
    style.axis(at, x="frames", name=name)
    at.grid(alpha=0.3)


def _amortise(result: Result, path: Path) -> Path:
    of = style.figure(9, 4.8)
    at = of.subplots()
    for row in result["rows"]:
        sums = [value / 1e3 for value in row["cumulative_ttft_ms"]]
        asked = row["asked"]
        name = _NAMES[row["arm"]].replace(", first question", "").replace(", ready", "")
        places = range(1, len(sums) + 1)
        colour = _colour(row["arm"])
        at.plot(places[:asked], sums[:asked], color=colour, label=f"{name}", marker=_marker(row["arm"]), markersize=3)
        at.plot(places[asked - 1 :], sums[asked - 1 :], color=colour, linestyle=":")
    at.set_xscale("log", base=2)
    at.set_yscale("log")
    at.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    style.plain_ticks(at.yaxis)
    style.axis(at, x="questions about the video", y="waited for first tokens, s, in all")
    at.grid(alpha=0.3)
    first = result["rows"][0]
    how = f"{_details(result)}; {first['frames']} frames, {first['resolution']} px; dotted: their median goes on"
    style.title(of, "When an adapter pays, internalization included", how)
    style.legend(of, at)
    return style.save(of, path)


def _throughput(result: Result, path: Path) -> Path:
    """Requests a second over concurrency, or bars if there is only one concurrency."""
    rows = result["rows"]
    popularities = list(dict.fromkeys(row["popularity"] for row in rows))
    counts = sorted({row["concurrency"] for row in rows})
    of = style.figure(2.5 + 4.2 * len(popularities), 4.6)
    panels = of.subplots(1, len(popularities), squeeze=False, sharey=True)[0]
    for at, popularity in zip(panels, popularities, strict=True):
        some = [row for row in rows if row["popularity"] == popularity]
        for place, arm in enumerate(arm for arm in _ARMS if any(row["arm"] == arm for row in some)):
            points = sorted((row["concurrency"], row["request_throughput"]) for row in some if row["arm"] == arm)
            if len(counts) > 1:
                _line(at, arm, *zip(*points, strict=True))
            else:
                drawn = at.bar(place, points[0][1], 0.7, color=_colour(arm), label=_NAMES[arm])
                at.bar_label(drawn, [f"{points[0][1]:.3g}"], padding=2)
        if len(counts) > 1:
            at.set_xscale("log", base=2)
            at.set_xticks(counts, [str(count) for count in counts])
        else:
            at.set_xticks([])
        at.set_yscale("log")
        style.plain_ticks(at.yaxis)
        style.axis(
            at, x="questions at a time" if len(counts) > 1 else f"{counts[0]} questions at a time", name=popularity
        )
        at.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("requests per second")
    first = rows[0]
    style.title(
        of,
        "Many videos asked at once",
        f"{_details(result)}; {first['videos']} videos of {first['frames']} frames, {first['resolution']} px",
    )
    style.legend(of, panels[0])
    return style.save(of, path)


def _tax(result: Result, path: Path) -> Path:
    """Speed with LoRA, relative to the speed without it."""
    ratios = [ratio for ratio in result["ratios"] if ratio["over"] == "no LoRA"]
    of = style.figure(8, 4.4)
    at = of.subplots()
    names = [
        ("prefill" if r["traffic"] == "prefill" else f"{r['streams']} streams") + f"\n{r['adapters']} adapters"
        for r in ratios
    ]
    colours = [style.ORANGE if ratio["traffic"] == "prefill" else style.BLUE for ratio in ratios]
    drawn = at.bar(range(len(ratios)), [ratio["speed"] for ratio in ratios], 0.7, color=colours)
    at.bar_label(drawn, [f"{ratio['speed']:.2f}" for ratio in ratios], padding=2)
    at.axhline(1, color="black", linestyle="--", linewidth=1)
    at.set_xticks(range(len(ratios)), names)
    at.set_ylim(0, 1.15 * max([1.0, *(ratio["speed"] for ratio in ratios)]))
    style.axis(at, y="speed / speed without LoRA")
    at.grid(axis="y", alpha=0.3)
    style.title(of, "What LoRA leaves of the speed of text traffic", _details(result))
    return style.save(of, path)


def _ramp(result: Result, path: Path) -> Path:
    """The share of good answers over the rate of questions, with its intervals."""
    rows = sorted(result["rows"], key=lambda row: row["rate"])
    rates, shares = [row["rate"] for row in rows], [row["share"] for row in rows]
    ends = [[abs(row["share"] - row["share_ci95"][end]) for row in rows] for end in (0, 1)]
    of = style.figure(8, 4.4)
    at = of.subplots()
    at.errorbar(rates, shares, ends, color=style.BLUE, marker="o", capsize=3, label="95 % interval")
    wanted, best = result["configuration"]["share"], result["highest"]
    at.axhline(wanted, color="black", linestyle="--", linewidth=1, label=f"wanted: {wanted:.3g}")
    if best is not None:
        at.axvline(best["rate"], color=style.ORANGE, linewidth=2, label=f"highest rate held: {best['rate']:g}/s")
    at.set_xscale("log")
    style.plain_ticks(at.xaxis)
    style.axis(at, x="questions per second", y="share of good answers")
    at.grid(axis="y", alpha=0.3)
    style.title(of, "Good answers over the rate of questions", _details(result))
    style.legend(of, at)
    return style.save(of, path)


def _capacity(result: Result, path: Path) -> Path:
    rows = sorted(result["rows"], key=lambda row: row["frames"])
    of = style.figure(8, 4.4)
    at = of.subplots()
    frames = [row["frames"] for row in rows]
    for arm, key, name in (("adapter", "adapter_videos", "as adapters"), ("frames", "kv_videos", "as KV caches")):
        colour, marker = _colour(arm), _marker(arm)
        at.plot(frames, [row[key] for row in rows], color=colour, marker=marker, label=name)
    at.set_xscale("log", base=2)
    at.set_yscale("log")
    at.set_xticks(frames, [str(count) for count in frames])
    style.plain_ticks(at.yaxis)
    style.axis(at, x="frames", y=f"videos in {result['configuration']['gb']:g} GB")
    at.grid(alpha=0.3)
    style.title(of, "Videos that stay answerable", f"{result['configuration']['model']}, counted")
    style.legend(of, at)
    return style.save(of, path)


def _line(at: Axes, arm: str, x: Any, y: Any) -> None:
    at.plot(x, y, marker=_marker(arm), color=_colour(arm), label=_NAMES[arm])


def _colour(arm: str) -> str:
    return (*style.COLOURS, style.GREY)[_ARMS.index(arm)]


def _marker(arm: str) -> str:
    return (*style.MARKERS, "X")[_ARMS.index(arm)]


def _details(result: Result) -> str:
    return f"{report.model(result)}, {'asked from ' * ('url' in result.get('servers', {}))}{report.machine(result)}"
