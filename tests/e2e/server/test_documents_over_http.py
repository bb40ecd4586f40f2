"""What README, the pages under Start and the guides show is run as it stands; only the server's address is another."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support import ROOT
from tests.support.documents import URL, blocks, commands
from tests.support.server import Server

PAGES = ["README.md", *(f"docs/start/{page.name}" for page in sorted((ROOT / "docs" / "start").glob("*.md")))]
SHOWN = sorted({command for page in PAGES for command in commands(page)})
SERVE = re.compile(r"(?:\.venv/bin/f2l-vllm serve|launch/local\.sh|docker run .* f2l-vllm serve)(?P<words>.*)")
FOR_A_GPU = re.compile(r" (tune .*|doctor .*--gpu-check.*)")  # tests/e2e/doctor and tests/unit/engine run them
CLIENTS = ROOT / ".venv-clients" / "bin"
PROGRAMS = blocks("docs/integrations.md", "python")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder like a clone, in which a command may write."""
    for name in ("f2l_vllm", "launch", "tests", "Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    return tmp_path


def run(words: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(words, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", SHOWN)
def test_a_command_works(command: str, clone: Path, default_server: Server) -> None:
    """What installs, loads a released model or needs a container is checked as far as it goes without that."""
    words = shlex.split(command)
    if words[0] == "make":
        assert run(["make", "--dry-run", "--always-make", *words[1:]], clone)
    elif "docker" in words:
        named = words[words.index("-f") + 1] if "-f" in words else "launch/Dockerfile"
        assert (clone / named).is_file()
    if serve := SERVE.match(command):
        flags = [word for word in shlex.split(serve["words"]) if "/" not in word]
        prints = ["-m", "f2l_vllm.cli", "serve", "f2l-tiny", *flags, "--dry-run"]
        assert "vllm" in run([sys.executable, *prints], clone, F2L_RAY_ADDRESS="auto")  # which may have GPUs
    elif words[0] in ("curl", ".venv/bin/f2l-vllm"):
        asked = shlex.split(command.replace(URL, default_server.url))
        told = run([*asked, *(["--help"] if FOR_A_GPU.search(command) else [])], clone)
        assert not FOR_A_GPU.search(command) or all(word in told for word in asked if word.startswith("--"))
        if words[0] == "curl":
            assert "error" not in json.loads(told)
    else:
        assert words[0] == "make" or "docker" in words, "a command of a kind that no test knows"


def test_readme_shows_what_the_model_answers(clone: Path, default_server: Server) -> None:
    ask = next(command for command in commands("README.md") if " ask " in command)
    assert run(shlex.split(ask.replace(URL, default_server.url)), clone) == blocks("README.md", "")[0]


def test_readmes_program_asks(default_server: Server) -> None:
    (program,) = blocks("README.md", "python")
    told = run([sys.executable, "-c", program.replace(URL, default_server.url)], ROOT)
    text, tokens = told.split()
    assert text == "Black."
    assert int(tokens) < 20


def test_many_videos_are_uploaded_and_asked_at_once(clips: list[Path], default_server: Server) -> None:
    upload, ask = blocks("docs/many-videos.md", "python")
    call = f"""
async def both():
    videos = await upload(Path({str(clips[0].parent)!r}))
    client = AsyncOpenAI(base_url="{URL}/v1", api_key="none")
    print(len(set(videos.values())), len(await describe(client, list(videos.values()))))

asyncio.run(both())
"""
    program = "\n".join((upload, ask, call)).replace(URL, default_server.url)
    assert run([sys.executable, "-c", program], ROOT).split() == ["6", "6"]


@pytest.fixture
def clients() -> Path:
    if not CLIENTS.is_dir():
        pytest.skip("the packages of clients.txt are not installed: make test-clients")
    return CLIENTS


@pytest.mark.parametrize("program", PROGRAMS, ids=PROGRAMS.index)
def test_an_integration_answers_about_the_video(program: str, clients: Path, default_server: Server) -> None:
    program = program.replace(URL, default_server.url).replace('"f2l-tiny"', '"base"')
    answers = run([str(clients / "python"), "-c", program], ROOT, LITELLM_LOCAL_MODEL_COST_MAP="True").split()
    assert answers
    assert set(answers) == {"Black."}


def test_the_notebook_runs(clients: Path, default_server: Server, tmp_path: Path) -> None:
    shown = ROOT / "docs" / "notebooks" / "ask.ipynb"
    done = tmp_path / "done.ipynb"
    words = [str(clients / "jupyter-execute"), str(shown), f"--output={done}"]
    run(words, ROOT, F2L_URL=default_server.url, PATH=f"{clients}:{os.environ['PATH']}")
    cells = [cell for cell in json.loads(done.read_text())["cells"] if cell["cell_type"] == "code"]
    told = "".join("".join(output["text"]) for output in cells[1]["outputs"])
    assert len(re.findall(r"^(?:adapter|frames) .*\.$", told, re.MULTILINE)) == 6
    assert "  0 of them visual" in told
    assert all(cell["outputs"] == [] for cell in json.loads(shown.read_text())["cells"] if cell["cell_type"] == "code")


def test_open_webui_lists_a_video_and_chats_with_it(default_server: Server) -> None:
    """As its backend asks: the models of the connection, then a stream."""
    file = default_server.upload(ROOT / "f2l_vllm" / "models" / "sample.mp4")
    headers = {"Authorization": "Bearer none", "Content-Type": "application/json"}
    listed = httpx.get(f"{default_server.url}/v1/models", headers=headers).raise_for_status().json()
    assert listed["object"] == "list"
    for model in listed["data"]:
        assert isinstance(model["id"], str)
        assert isinstance(model.get("name", ""), str)
        assert model["object"] == "model"
    assert {"base", file.id} <= {model["id"] for model in listed["data"]}
    question = {"model": file.id, "stream": True, "messages": [{"role": "user", "content": "What is the background?"}]}
    with httpx.stream("POST", f"{default_server.url}/v1/chat/completions", headers=headers, json=question) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    text = "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1])
    assert text == "Black."
