"""The paper's sets from their annotations to tables, on made-up files of the published layouts."""

import json
import re

import pytest
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from f2l_vllm.evaluation.paper import published, tables
from f2l_vllm.evaluation.paper.preparing import VideosMissing, draw, prepare
from f2l_vllm.evaluation.paper.sets import SETS, SHORT, find
from f2l_vllm.train.data.manifest import read_manifest
from tests.support.paper_files import write_annotations

NAMES = [f"v_{number:05d}" for number in range(8)]
EACH = {"vdc": 5, "carebench": 5, "vidcapbench": 2}  # examples of a video; of others one


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos" / "in" / "folders"
    folder.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (folder / f"{name}.{('mp4', 'mkv', 'MP4')[number % 3]}").write_bytes(b"a video")
    return tmp_path / "videos"


def prepared(name, tmp_path, videos, **options):
    annotations = write_annotations(name, tmp_path / "annotations", NAMES)
    return prepare(find(name), annotations, videos, tmp_path / "out", **options)


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_read_from_its_published_layout(name, tmp_path, videos):
    made = prepared(name, tmp_path, videos)
    examples = read_manifest(made.manifest)
    assert made.examples == len(examples) == 8 * EACH.get(name, 1)
    assert {example.task_type for example in examples} == set(SETS[name].prompts)
    assert {example.video_path.stem for example in examples} == set(NAMES)
    assert {example.dataset for example in examples} == {SETS[name].title}
    for example in examples:
        asks = "{question}" in SETS[name].prompts[example.task_type]
        assert example.prompt.endswith(f"?\n\n{SHORT}") if asks else example.prompt.endswith(".")
        assert example.target_text
    assert {example.span for example in examples} == ({(0.0, 1.0)} if name == "plm-rcap" else {None})


def test_references_are_whole(tmp_path, videos):
    texts = {
        name: {e.target_text for e in read_manifest(prepared(name, tmp_path / name, videos).manifest)} for name in SETS
    }
    assert texts["activitynet-captions"] == {"A shape moves. It stops."}
    assert texts["plm-rdcap"] == {"A circle. It grows."}
    assert "It comes; it goes" in texts["carebench"]


def test_a_sample_is_of_each_type_and_the_same_for_the_same_seed(tmp_path):
    one = find("vdc")
    items = one.read(write_annotations("vdc", tmp_path, NAMES))
    drawn = draw(one, items, 3, 0)
    assert [sum(item.kind == kind for item in drawn) for kind in one.prompts] == [3] * 5
    assert drawn == draw(one, items, 3, 0) != draw(one, items, 3, 1)
    whole = find("vidcapbench")
    items = whole.read(write_annotations("vidcapbench", tmp_path, NAMES))
    assert len(draw(whole, items, 3, 0)) == 6
    assert len({item.video for item in draw(whole, items, 3, 0)}) == 3


def test_missing_videos_are_never_left_out_silently(tmp_path, videos):
    next(videos.rglob(f"{NAMES[2]}.*")).unlink()
    with pytest.raises(VideosMissing, match=r"1 of 8 videos.*v_00002.*--allow-missing"):
        prepared("nextqa", tmp_path, videos)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    assert (tmp_path / "out" / "missing.txt").read_text() == "v_00002\n"
    made = prepared("nextqa", tmp_path, videos, allow_missing=True)
    assert (made.examples, made.missing) == (7, ("v_00002",))
    with pytest.raises(VideosMissing):  # none at all is never allowed
        prepare(
            find("nextqa"), tmp_path / "annotations" / "test.csv", tmp_path / "out", tmp_path / "x", allow_missing=True
        )


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        ("nextqa", "test.csv", "video,question\n1,what\n", "'qid'"),
        ("plm-sgqa", "sgqa.jsonl", '{"uid": 1, "video": "a"}\n', "'answer'"),
        ("plm-sgqa", "sgqa.jsonl", "{\n", "line 1"),
        ("carebench", "carebench.json", "{}", "an array"),
        ("activitynet-captions", "val_1.json", "[]", "an object by video"),
        ("activitynet-captions", "val_1.json", "{}", "no example"),
        ("plm-sgqa", "sgqa.parquet", "", "pyarrow"),
    ],
)
def test_another_layout_is_refused_with_what_is_expected(tmp_path, videos, name, file, text, said):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=said):
        prepare(find(name), tmp_path / file, videos, tmp_path / "out")


def test_an_unknown_set_or_folder_is_refused(tmp_path, videos):
    with pytest.raises(ValueError, match=r"choose one of activitynet-captions"):
        find("msrvtt")
    with pytest.raises(ValueError, match=r"download the annotations from https://github.com/doc-doc"):
        prepare(find("nextqa"), tmp_path / "no.csv", videos, tmp_path / "out")
    folder = write_annotations("vdc", tmp_path / "vdc", NAMES)
    (folder / "camera.json").unlink()
    with pytest.raises(ValueError, match=r"no camera\.parquet"):
        prepare(find("vdc"), folder, videos, tmp_path / "out")


def ran(folder, name, metric, scale=1.0):
    """A result as `eval` writes it, of a run that gave the paper's figures."""
    folder.mkdir()
    about = {"set": name, "missing": ["a"], "examples": 7, "examples_drawn": 8}
    (folder / "paper.json").write_text(json.dumps(about))
    shown = published.figure(name, metric, "500m")
    comparison = {
        "difference": shown.difference * scale,
        "ci95": [bound * scale for bound in shown.interval],
        "non_inferior": {"shown": shown.non_inferior},
        "equivalent": {"shown": shown.equivalent},
    }
    arms = {"adapter": {"score": shown.adapter * scale, "n": 7}, "frames": {"score": shown.frames * scale, "n": 7}}
    row = {"dataset": "VDC", "type": "camera", "n": 7, "arms": arms, "comparison": comparison}
    result = {"comparisons": {"adapter - frames": comparison}, "arms": arms, "table": [row], "skipped": []}
    (folder / tables.result_file(metric)).write_text(json.dumps(result))
    return folder


@pytest.mark.parametrize(("metric", "scale"), [("f1", 1.0), ("judge", 5.0)])
def test_our_figures_stand_beside_the_papers(tmp_path, metric, scale):
    report = tables.read([ran(tmp_path / "vdc", "vdc", metric, scale)], metric, "500m")
    whole, style = report.rows
    paper = published.figure("vdc", metric, "500m")
    assert whole[3:5] == whole[8:10] == (f"{paper.frames:.3f}", f"{paper.adapter:.3f}")
    assert whole[5] == whole[10] == f"{paper.difference:+.3f} [{paper.interval[0]:+.3f}, {paper.interval[1]:+.3f}]"
    assert whole[-1] == "+0.000"
    assert style[:3] == ("", "camera", "7")
    assert style[8] == ("0.310" if metric == "judge" else "–")
    assert any("7 of 8 examples" in note for note in report.notes)


def test_reports_are_markdown_latex_and_a_page(tmp_path):
    folder = ran(tmp_path / "nextqa", "nextqa", "f1")
    written = {name: tmp_path / f"report.{name}" for name in ("markdown", "latex", "page")}
    flags = [word for name, path in written.items() for word in (f"--{name}", str(path))]
    found = CliRunner().invoke(app, ["paper", "report", str(folder), "--size", "500m", *flags])
    assert found.exit_code == 0, found.output
    rows = [line for line in written["markdown"].read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    latex = written["latex"].read_text()
    body = [line for line in latex.splitlines() if line.endswith("\\\\")]
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1
    assert "NExT-QA" in latex
    assert "−" not in latex
    assert "<td>NExT-QA</td>" in written["page"].read_text()
    assert "http" not in written["page"].read_text()
    again = CliRunner().invoke(app, ["paper", "report", str(folder), *flags])
    assert again.exit_code != 0  # nothing is written over


def test_the_papers_differences_are_those_of_its_means_up_to_rounding():
    for name, size in ((name, size) for name in SETS for size in published.SIZES):
        for metric in published.METRICS:
            found = published.figure(name, metric, size)
            assert abs(found.adapter - found.frames - found.difference) < 0.0025, (name, metric, size)
            assert found.interval[0] < found.difference < found.interval[1]


def test_the_command_lists_prepares_and_refuses(tmp_path, videos):
    listed = CliRunner().invoke(app, ["paper", "list"]).output
    assert all(name in listed for name in SETS)
    assert listed.count("assumed") == 2
    annotations = write_annotations("nextqa", tmp_path / "annotations", NAMES)
    out = tmp_path / "out"
    words = ["--annotations", str(annotations), "--videos", str(videos), "--out", str(out)]
    assert "8 examples" in CliRunner().invoke(app, ["paper", "prepare", "nextqa", *words]).output
    assert CliRunner().invoke(app, ["paper", "prepare", "msrvtt", *words]).exit_code != 0
    assert "nothing was run" in CliRunner().invoke(app, ["paper", "report", str(out)]).output.replace("\n", " ")
    assert CliRunner().invoke(app, ["paper", "run", str(videos)]).exit_code != 0
    assert CliRunner().invoke(app, ["paper", "report", str(out), "--size", "7b"]).exit_code != 0
