"""The page about one machine: what agrees, and what answers and adapters cost, with the commands that measured it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from f2l_vllm.bench import report, run
from f2l_vllm.doctor.findings import Finding
from f2l_vllm.evaluation import environment

NAME = "README.md"


def markdown(header: dict[str, Any], findings: Sequence[Finding], results: Sequence[Path]) -> str:
    """The page.

    Args:
        header: of the check, as `bench.record.header` makes it.
        results: the files that were measured; each has a section.
    """
    versions = ", ".join(f"{name} {found}" for name, found in header["versions"].items())
    wrong = sum(finding.trouble is not None for finding in findings)
    verdict = "Everything agrees." if not wrong else f"{wrong} of {len(findings)} checks disagree or did not run."
    lines = [
        f"# {environment.name(header['machine'])}",
        "",
        f"{header['machine']['system']}, {header['machine']['memory_gib']:.0f} GiB; {header['date'][:10]}; {versions}.",
        f"`{header['command']}`",
        "",
        "## Does it agree?",
        f"{verdict} Answers are compared with {header['configuration']['model']}.",
        "",
        *(f"- {_one_line(finding.line)}" for finding in findings),
    ]
    for path in results:
        lines += ["", *_section(path)]
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _section(path: Path) -> list[str]:
    content = json.loads(path.read_text())
    if "suite" in content:
        title, _, _, *rest = report.markdown(run.measured(path)).rstrip().split("\n")
        return [f"#{title}", f"[{path.name}]({path.name})", *rest]
    configuration = content["configuration"]
    stages = list(next(iter(content["results"].values()))["seconds"])
    header = ["frames", "prompt tokens", *(f"{stage}, s" for stage in stages), "all, s", "peak above weights, MiB"]
    rows = [
        [
            *(str(one[name]) for name in ("frames", "prompt_tokens")),
            *(f"{one['seconds'][stage]:.3f}" for stage in stages),
            f"{one['seconds_in_all']:.3f}",
            f"{max(one['peak_above_weights_mib'].values()):,.0f}",
        ]
        for one in content["results"].values()
    ]
    title = f"## internalize: {configuration['model']} in {configuration['dtype']}"
    return [title, f"[{path.name}]({path.name})", "", *report.markdown_table(header, rows)]
