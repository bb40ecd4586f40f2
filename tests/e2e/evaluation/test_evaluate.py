"""`f2l-vllm eval` as a newcomer runs it: real videos, the shipped model, a real server; and the same in process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from openai import OpenAI
from typer.testing import CliRunner, Result

from f2l_vllm.cli.main import app
from f2l_vllm.evaluation.answers import ANSWERS_FILE, read_answers
from f2l_vllm.evaluation.sources import world_questions
from f2l_vllm.synthetic.phrases import QUESTION_TYPES
from tests.support.endpoint import Endpoint
from tests.support.videos import write_video

WORLD = ("--world", "held-out", "--videos", "4", "--seed", "11")
ARMS = ("adapter", "frames", "none", "wrong-video")


def run(*options: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, options)], catch_exceptions=False)


def evaluate(folder: Path, *options: object) -> dict:
    """Run to success; the JSON that was written."""
    result = run("--work", folder, "--json", folder / "result.json", "--overwrite", *options)
    assert result.exit_code == 0, result.output
    return json.loads((folder / "result.json").read_text())


def answers_of(folder: Path) -> dict:
    return {answer.key: answer for answer in read_answers(folder / ANSWERS_FILE)}


@pytest.fixture(scope="module")
def base_url(evaluated_url: str) -> str:
    return evaluated_url


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes working folders that hold the world's videos already, as an earlier run leaves them."""
    drawn = tmp_path_factory.mktemp("drawn")
    world_questions("held-out", 4, 11, drawn)
    return lambda: shutil.copytree(drawn, tmp_path_factory.mktemp("work"), dirs_exist_ok=True)


@pytest.fixture(scope="module")
def served(base_url: str, working_folder: Callable[[], Path]) -> tuple[Path, dict]:
    """Four videos asked about through the server, in every arm: the working folder and the results."""
    folder = working_folder()
    result = evaluate(folder, *WORLD, "--base-url", base_url, "--markdown", folder / "table.md")
    return folder, result


@pytest.fixture(scope="module")
def in_process(working_folder: Callable[[], Path]) -> tuple[Path, dict]:
    """The same questions through transformers, and the videos in chunks."""
    folder = working_folder()
    return folder, evaluate(folder, *WORLD, "--through", "transformers", "--composition")


def test_the_headline_of_fresh_videos(served):
    folder, result = served
    assert list(result["arms"]) == list(ARMS)
    for scores in result["arms"].values():
        assert (scores["n"], scores["videos"], scores["caption"]["n"]) == (40, 4, 4)
        assert tuple(scores["by_type"]) == QUESTION_TYPES
        assert scores["ci95"][0] <= scores["score"] <= scores["ci95"][1]
    arms = {arm: scores["score"] for arm, scores in result["arms"].items()}
    assert min(arms["adapter"], arms["frames"]) > 0.75
    assert max(arms["none"], arms["wrong-video"]) < 0.6
    assert list(result["comparisons"]) == ["adapter - frames", "adapter - none", "adapter - wrong-video"]
    tokens = {arm: scores["cost"]["prompt_tokens"] for arm, scores in result["arms"].items()}
    assert tokens["adapter"] == tokens["none"] == tokens["wrong-video"] < tokens["frames"] / 5
    assert result["skipped"] == []
    assert result["configuration"]["seed"] == 11
    assert result["versions"]["f2l-vllm"]
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[2].split(" | ")[1:3] == ["type", "n"]
    assert sum("world, held-out" in line for line in lines) == 12


def test_every_answer_is_a_line_with_its_cost(served):
    folder, _ = served
    answers = answers_of(folder)
    assert len(answers) == 4 * 11 * 4
    for answer in answers.values():
        assert answer.ttft_ms > 0
        assert answer.seconds * 1e3 >= answer.ttft_ms - 1
        assert (folder / answer.video).is_file()
        assert answer.visual_tokens == (32 if answer.arm == "frames" else 0)  # four of each of eight frames


def test_an_evaluation_leaves_no_files_on_a_running_server(served, base_url):
    assert list(OpenAI(base_url=base_url, api_key="none").files.list()) == []


def test_server_and_transformers_agree(served, in_process):
    ours, theirs = answers_of(served[0]), answers_of(in_process[0])
    same = [answer.answer == theirs[key].answer for key, answer in ours.items()]
    assert sum(same) / len(same) >= 0.97
    for arm in ARMS:
        scores = [result["arms"][arm]["score"] for _, result in (served, in_process)]
        assert scores[0] == pytest.approx(scores[1], abs=1 / 40 + 1e-4)  # bf16 adapters may turn one answer


def test_one_chunk_is_the_single_adapter(in_process):
    folder, result = in_process
    answers = answers_of(folder)
    composition = result["composition"]
    assert list(composition) == ["1 chunk", "2 chunks", "4 chunks"]
    assert composition["1 chunk"]["score"] == result["arms"]["adapter"]["score"]
    for (arm, question), answer in answers.items():
        if arm == "adapter":
            assert answers["1 chunk", question].answer == answer.answer
    assert composition["2 chunks"]["ratio"]["value"] > 0.7
    assert any(answers["4 chunks", q].answer != a.answer for (arm, q), a in answers.items() if arm == "adapter")


def test_a_killed_evaluation_goes_on_where_it_was(base_url, working_folder):
    folder = working_folder()
    options = [*WORLD, "--base-url", base_url, "--work", str(folder), "--concurrency", "1"]
    process = subprocess.Popen([sys.executable, "-m", "f2l_vllm.cli", "eval", *options], stdout=subprocess.DEVNULL)
    path = folder / ANSWERS_FILE
    while not path.exists() or path.read_bytes().count(b"\n") < 20:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    kept = before[: before.rindex(b"\n") + 1]
    assert 20 <= kept.count(b"\n") < 4 * 11 * 4
    path.write_bytes(kept + b'{"id": "held-out-11-00')  # the harshest moment for a kill
    result = run(*options)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(kept)
    answers = read_answers(path)
    assert len(answers) == len({answer.key for answer in answers}) == 4 * 11 * 4
    client = OpenAI(base_url=base_url, api_key="none")
    for file in client.files.list():  # what the killed one could not delete
        client.files.delete(file.id)


def test_answers_of_another_configuration_are_not_mixed_in(served, base_url):
    for other, difference in (
        (("--max-tokens", "8", "--base-url", base_url), "max_tokens: 64 there, 8 here"),
        (("--serve-flags", "--video-pruning-rate 0.5"), "serve_flags: None there, '--video-pruning-rate 0.5' here"),
    ):
        result = run(*WORLD, *other, "--work", served[0])
        assert result.exit_code == 2
        assert difference in " ".join(result.output.replace("│", " ").split())


def test_kept_answers_are_judged_without_asking_again(served, base_url):
    folder, _ = served
    before = answers_of(folder)
    endpoint = Endpoint(lambda messages: None if not messages else '{"score": 5}')
    try:
        judge = ("--judge-base-url", endpoint.url, "--judge-model", "grader")
        result = evaluate(folder, *WORLD, "--base-url", base_url, *judge, "--metric", "judge")
    finally:
        endpoint.close()
    assert {scores["score"] for scores in result["arms"].values()} == {5.0}
    assert result["arms"]["adapter"]["unjudged"] == 0
    assert result["configuration"]["judge"]["scale"] == [0, 5]
    comparison = result["comparisons"]["adapter - frames"]
    assert comparison["non_inferior"]["margin"] == comparison["equivalent"]["margin"] == 0.75
    after = answers_of(folder)
    assert {key: asdict(answer) | {"judge": None} for key, answer in after.items()} == {
        key: asdict(answer) for key, answer in before.items()
    }


def test_spans_of_one_file_count_as_one_video_also_where_kept_answers_do_not_say_so(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames=40, fps=10)
    common = {"prompt": "Describe the video.", "target_text": "A bar.", "task_type": "caption", "dataset": "bars"}
    rows = [
        common | {"id": f"{name}-{start}", "video_path": name, "split": "test", "metadata": span}
        for name in ("a.mp4", "b.mp4")
        for start in (0, 1)
        if (span := {"start": start, "end": start + 2})
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--manifest", tmp_path / "m.jsonl", "--through", "transformers", "--arms", "adapter")
    work = tmp_path / "work"
    first = evaluate(work, *options)["arms"]["adapter"]
    assert (first["n"], first["videos"]) == (4, 2)
    lines = [asdict(answer) for answer in read_answers(work / ANSWERS_FILE)]
    for line in lines:
        del line["source"]
    (work / ANSWERS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate(work, *options)["arms"]["adapter"] == first
    assert len({answer.source for answer in read_answers(work / ANSWERS_FILE)}) == 2


def test_a_manifest_is_asked_and_a_broken_video_left_out(base_url, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames=30, size=(64, 64) if name == "a.mp4" else (96, 64))
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    common = {"prompt": "Describe the video.", "target_text": "A bar.", "task_type": "caption", "dataset": "bars"}
    rows = [common | {"id": name, "video_path": name, "split": "test"} for name in ("a.mp4", "b.mp4", "broken.mp4")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--manifest", tmp_path / "m.jsonl", "--base-url", base_url, "--arms", "adapter,none")
    result = evaluate(tmp_path / "work", *options)
    assert result["arms"]["adapter"]["metric"] == "f1"
    assert {scores["n"] for scores in result["arms"].values()} == {2}
    (skipped,) = result["skipped"]
    assert skipped["video"].endswith("broken.mp4")
    assert skipped["reason"].startswith("not_a_video: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "adapter,best"], "arms are some of adapter, frames, none, wrong-video"),
        (["--world", "test"], "unknown split 'test'"),
        (["--split", "test"], "--split chooses from a manifest"),
        (["--metric", "judge"], "needs a judge"),
        (["--judge-model", "x"], "give --judge-base-url and --judge-model"),
        (["--through", "vllm"], "through server or transformers"),
        (["--through", "transformers", "--base-url", "http://x/v1"], "make no sense when transformers answers"),
        (["--model", "no-such-model", "--videos", "1", "--arms", "none"], "no model at 'no-such-model'"),
        (["--margin", "-1"], "must be positive"),
    ],
)
def test_bad_options_are_said_at_once(options, message, tmp_path):
    result = run("--work", tmp_path, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
