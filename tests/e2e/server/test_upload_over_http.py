"""`f2l-vllm upload` to a real server."""

import json
import shutil

from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from tests.support.videos import write_video


def test_a_folder_of_videos_is_there_after_it_and_a_broken_one_is_said(server, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(4):
        write_video(folder / f"{number}.mp4", frames=12 + number, fps=9)
    shutil.copy(folder / "0.mp4", folder / "same.mp4")
    (folder / "broken.mp4").write_bytes(b"no video")

    def upload():
        done = CliRunner().invoke(app, ["upload", str(folder), "--url", server.url, "--wait"])
        print(done.stderr, repr(done.exception))
        return done.exit_code, {
            row["path"].rpartition("/")[2]: row for row in map(json.loads, done.stdout.splitlines())
        }

    code, rows = upload()
    assert (code, len(rows)) == (1, 6)
    assert rows.pop("broken.mp4")["error"]["code"] == "not_a_video"
    assert {row["status"] for row in rows.values()} == {"processed"}
    assert rows["same.mp4"]["id"] == rows["0.mp4"]["id"]
    assert len({row["id"] for row in rows.values()}) == 4
    for row in rows.values():
        assert server.client.files.retrieve(row["id"]).model_extra["f2l"]["sha256"] == row["sha256"]
    count = len([*server.client.files.list()])
    (folder / "broken.mp4").unlink()
    assert upload() == (0, rows)
    assert len([*server.client.files.list()]) == count
