"""What MkDocs cannot find in docs/: README as the first page, the reference made from code, and what pages link to.

Pages link as GitHub shows them, by paths in the repository. Whatever they link to outside docs/ becomes part of the
site, under `repository/`: Markdown as a page, pictures and JSON as they are, other text as a page of code. A link to
nothing is left as it is, and MkDocs warns of it.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")
AS_THEY_ARE = {".png", ".jpg", ".webp", ".svg", ".json", ".csv", ".mp4"}
_origin: dict[str, str] = {}  # of a page, where its links begin: the file's path in the repository


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add all pages and files that are not in docs/."""
    for page in files.documentation_pages():
        _origin[page.src_uri] = f"docs/{page.src_uri}"
    _add(files, config, "README.md")
    for name, text in reference().items():
        files.append(File.generated(config, f"reference/{name}", content=text))
        _origin[f"reference/{name}"] = f"docs/reference/{name}"
    todo = list(files.documentation_pages())
    while todo:
        page = todo.pop()
        for link in LINK.findall(page.content_string):
            target = _target(page.src_uri, link)
            if (ROOT / target).exists() and files.get_file_from_path(_uri(target)) is None:
                file = _add(files, config, target)
                if file.is_documentation_page():
                    todo.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to their places in the site."""
    here = page.file.src_uri

    def place(link: re.Match[str]) -> str:
        target = _target(here, link[0])
        found = (ROOT / target).exists() or files.get_file_from_path(_uri(target)) is not None
        return posixpath.relpath(_uri(target), posixpath.dirname(here) or ".") if found else link[0]

    return LINK.sub(place, markdown)


def _target(page: str, link: str) -> str:
    """The path in the repository that a page's link means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_origin[page]), link))


def _uri(target: str) -> str:
    """Where a file of the repository is in the site's sources."""
    if target == "README.md":
        return "index.md"
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    as_it_is = Path(target).suffix in AS_THEY_ARE | {".md"}
    return f"repository/{target}" if as_it_is else f"repository/{target}.md"


def _add(files: Files, config: MkDocsConfig, target: str) -> File:
    """Add a file, or a list of a folder's."""
    path, uri = ROOT / target, _uri(target)
    _origin[uri] = target
    if path.suffix in AS_THEY_ARE:
        file = File.generated(config, uri, abs_src_path=str(path))
    elif path.is_dir():
        names = "".join(f"- `{name}`\n" for name in sorted(os.listdir(path)) if name[0] not in "._")
        file = File.generated(config, uri, content=f"# {target}/\n\n{names}")
    elif path.suffix == ".md":
        file = File.generated(config, uri, content=path.read_text())
    else:
        language = {".py": "python", ".yaml": "yaml", ".toml": "toml"}.get(path.suffix, "text")
        file = File.generated(config, uri, content=f"# {target}\n\n````{language}\n{path.read_text()}\n````\n")
    files.append(file)
    return file


def reference() -> dict[str, str]:
    """Pages made from the code, and the OpenAPI description: name, text."""
    import json

    from f2l_vllm.server.app import openapi as description

    openapi = description.reference()
    return {
        "command-line.md": command_line(),
        "settings.md": settings(),
        "http.md": http(openapi),
        "openapi.json": json.dumps(openapi, indent=1),
    }


def command_line() -> str:
    """Every command with its arguments and options, as typer tells them."""
    import typer
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from f2l_vllm.cli.main import app

    command = get_command(app)
    text = get_docs_for_click(
        obj=command, ctx=typer.Context(command, info_name="f2l-vllm"), name="f2l-vllm", title="Command line"
    )
    return re.sub(r"^\* `--(help|install-completion|show-completion)`.*\n", "", text, flags=re.MULTILINE)


def settings() -> str:
    """Every setting with its variable, its flag where `serve` has one, its default and what it is for."""
    from typer.main import get_command

    from f2l_vllm.cli.main import app
    from f2l_vllm.settings import PREFIX, Settings

    serve: Any = get_command(app)
    flags = {option for parameter in serve.commands["serve"].params for option in parameter.opts}
    rows = []
    for name, field in Settings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        default = "" if field.default in (None, "") else f"`{_plain(field.default)}`"
        rows.append(
            f"| `{PREFIX}{name.upper()}` | {f'`{flag}`' if flag in flags else ''} | {default} | {field.description} |"
        )
    return SETTINGS_HEAD + "\n".join(rows) + "\n"


def _plain(value: object) -> str:
    if isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value >> 30} GiB" if value % (1 << 30) == 0 else f"{value >> 20} MiB"
    return str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def http(openapi: dict[str, Any]) -> str:
    """Every route about videos, and what this package adds to vLLM's."""
    parts = [HTTP_HEAD]
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            parts.append(f"## {method.upper()} {path}\n\n{route['description']}\n")
            rows = [_parameter(one) for one in route.get("parameters", ()) if one["in"] == "query"]
            if rows:
                parts.append("\n".join(["| parameter | default | values |", "|---|---|---|", *rows]) + "\n")
            if "F2LOptions" in str(_body(openapi, route)):
                parts.append("It takes [`f2l`](#the-field-f2l), and answers with `f2l`.\n")
    parts.append(FIELDS_HEAD)
    for name, what in FIELDS.items():
        described = openapi["components"]["schemas"][name]["properties"]
        rows = [f"| `{key}` | {_values(one)} | {one.get('description', '')} |" for key, one in described.items()]
        parts.append("\n".join([f"### {what}\n", "| field | values | |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _body(openapi: dict[str, Any], route: dict[str, Any]) -> dict[str, Any]:
    """The fields of a route's JSON body, if it has a model of one."""
    content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = openapi["components"]["schemas"].get(name, {}).get("properties", {})
    return found


def _values(schema: dict[str, Any]) -> str:
    """What a field may hold."""
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    words = []
    for kind in kinds:
        fixed = kind.get("enum") or ([kind["const"]] if "const" in kind else [])
        bounds = f" up to {kind['maximum']:g}" if "maximum" in kind else ""
        words += [f"`{value}`" for value in fixed] or [kind.get("type", "object") + bounds]
    return ", ".join(words)


def _parameter(parameter: dict[str, Any]) -> str:
    schema = parameter["schema"]
    kinds = schema.get("anyOf", [schema])
    values = ", ".join(
        f"`{value}`" for kind in kinds for value in kind.get("enum", [kind.get("const")]) if value is not None
    )
    values = values or next(kind["type"] for kind in kinds)
    if "maximum" in schema:
        values += f", {schema['minimum']} to {schema['maximum']}"
    return f"| `{parameter['name']}` | {schema.get('default', '')} | {values} |"


SETTINGS_HEAD = """# Settings

A setting is an environment variable; some are also flags of `f2l-vllm serve`, which take precedence. A variable that
begins with `F2L_` and is none of these is refused at start. `F2L_CPU_PLATFORM` (`auto`, `0`, `1`) and
`F2L_CPU_KV_BYTES` are for [vLLM without a GPU](../deploy.md#what-the-engine-is-started-with).

| variable | flag | default | |
|---|---|---|---|
"""
HTTP_HEAD = """# HTTP

Videos are files; their routes, and those of batches, are this server's. Questions go to vLLM's own routes, which take
what vLLM's documentation says and the [field `f2l`](#the-field-f2l): [asking](../asking.md). Also open are `/health`,
`/metrics` (Prometheus, `f2l_*` beside `vllm:*`) and [some more](../operations.md#routes). Every error has a stable
code: [errors](../errors.md). A program can read this page, with all of vLLM's fields, as an
[OpenAPI description](openapi.json). A server gives out its own under `/openapi.json` if `F2L_EXTRA_ROUTES` lists that.
"""
FIELDS_HEAD = """## The field f2l

vLLM's clients pass it in `extra_body`.
"""
FIELDS = {
    "F2LOptions": "In a question",
    "F2LSpan": "In a part that names a video",
    "F2LAnswer": "In an answer",
}
