"""A result as one HTML file that opens anywhere, without scripts: pictures, table, sentences, how it was measured."""

from __future__ import annotations

import tempfile
from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from f2l_vllm.bench import plots, report
from f2l_vllm.files import write_whole

_TEMPLATES = Path(__file__).parent / "templates"


def write(result: dict[str, Any], path: Path) -> None:
    """Write the page, whole or not at all."""
    header, rows = report.grid(result)
    with tempfile.TemporaryDirectory(prefix="f2l-bench-") as folder:
        pictures = {one.stem: b64encode(one.read_bytes()).decode() for one in plots.plot(result, Path(folder))}
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    text = environment.get_template("page.html.jinja").render(
        title=f"{result['suite']}: {report.model(result)}",
        where=report.where(result),
        command=result["command"],
        pictures=pictures,
        header=header,
        rows=rows,
        legend=report.LEGENDS[result["suite"]],
        sentences=report.sentences(result),
        facts={"Configuration": result["configuration"], "Server": result.get("servers", {})},
    )
    write_whole(path, text)
