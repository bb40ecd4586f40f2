"""A real server with an S3 bucket as its store."""

import fsspec

from tests.support.s3 import temporary_s3
from tests.support.server import Server

QUESTION = [{"role": "user", "content": "What is shown?"}]


def test_videos_are_kept_answered_and_removed_in_s3(hypernetwork_model, tmp_path, clips, monkeypatch):
    with temporary_s3() as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        bucket, root = fsspec.core.url_to_fs(s3.url, use_listings_cache=False)
        server = Server(hypernetwork_model, tmp_path / "home", env={"F2L_STORE": s3.url})
        try:
            server.wait_ready()
            files = [server.upload(clip) for clip in clips[:2]]
            assert [file.status for file in files] == ["processed"] * 2
            for file in files:
                answer = server.client.chat.completions.create(model=file.id, messages=QUESTION, max_tokens=4)
                assert answer.choices[0].finish_reason
            kinds = {path.removeprefix(root).split("/")[1] for path in bucket.find(root)}
            assert kinds == {"videos", "adapters"}
            again = server.upload(clips[0])  # the same bytes: one object
            assert len(bucket.find(f"{root}/videos")) == 2
            assert server.client.files.content(again.id).read() == clips[0].read_bytes()
            s3.pause()
            ready = server.client.chat.completions.create(model=again.id, messages=QUESTION, max_tokens=4)
            assert ready.choices[0].finish_reason
            s3.go_on()
            for file in server.client.files.list():
                url = f"/files/{file.id}?wait=erased"
                assert server.client.delete(url, cast_to=object)["f2l"]["erased"]
            assert bucket.find(root) == []
        finally:
            server.end()
