"""A real server with an S3 bucket as its store."""

import fsspec
from openai import OpenAI

from f2l_vllm.client import upload

QUESTION = [{"role": "user", "content": "What is shown?"}]


def test_videos_are_kept_answered_and_removed_in_s3(evaluated_url, s3, clips, monkeypatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    bucket, root = fsspec.core.url_to_fs(s3.url, use_listings_cache=False)
    client = OpenAI(base_url=evaluated_url, api_key="none", max_retries=0, timeout=120)

    def finish_reason(model):
        answer = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=4)
        return answer.choices[0].finish_reason

    files = upload(client, *clips[:2])
    assert all(finish_reason(file.id) for file in files)
    kinds = {path.removeprefix(root).split("/")[1] for path in bucket.find(root)}
    assert kinds == {"videos", "adapters"}
    [again] = upload(client, clips[0])  # the same bytes: one object
    assert len(bucket.find(f"{root}/videos")) == 2
    assert client.files.content(again.id).read() == clips[0].read_bytes()
    s3.pause()
    try:
        assert finish_reason(again.id)  # ready here
    finally:
        s3.go_on()
    for file in client.files.list():
        erased = client.delete(f"/files/{file.id}?wait=erased", cast_to=object)
        assert erased["f2l"]["erased"]
    assert bucket.find(root) == []
