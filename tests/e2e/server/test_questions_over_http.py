"""Videos in, answers out: a real server, real mp4 files, the stock openai client."""

import asyncio
import io
import os
import signal
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI

from f2l_vllm.client import metric
from f2l_vllm.hypernetwork.adapter import WEIGHTS_FILE
from tests.support.videos import write_video

QUESTION = [{"role": "user", "content": "What is shown in the video?"}]
GREEDY = {"temperature": 0, "max_tokens": 12}


def ask(server, model, messages=QUESTION, **options):
    return server.client.chat.completions.create(model=model, messages=messages, **GREEDY, **options)


def text(response):
    return response.choices[0].message.content


@pytest.fixture(scope="module")
def videos(server, clips):
    """Two ready videos."""
    return [server.upload(clip) for clip in clips[:2]]


def test_a_file_is_an_openai_file_with_details(server, videos, clips):
    file = videos[0]
    assert (file.object, file.purpose, file.status, file.filename) == ("file", "vision", "processed", clips[0].name)
    assert file.bytes == clips[0].stat().st_size
    details = file.model_extra["f2l"]
    assert details["stage"] == "processed"
    assert details["rank"] == 8
    assert details["visual_tokens"] > 0
    assert server.client.files.content(file.id).read() == clips[0].read_bytes()


def test_an_answer_costs_text_tokens_only_and_comes_from_the_adapter(server, videos):
    base, first, second = (ask(server, model) for model in ("base", videos[0].id, videos[1].id))
    assert first.usage.prompt_tokens == second.usage.prompt_tokens == base.usage.prompt_tokens
    assert len({text(base), text(first), text(second)}) == 3
    assert first.model == videos[0].id


def test_a_file_part_is_the_same_question(server, videos):
    part = {"type": "file", "file": {"file_id": videos[1].id}}
    content = [part, {"type": "text", "text": QUESTION[0]["content"]}]
    answer = ask(server, "base", [{"role": "user", "content": content}])
    direct = ask(server, videos[1].id)
    assert text(answer) == text(direct)
    assert (answer.model, answer.usage.prompt_tokens) == ("base", direct.usage.prompt_tokens)


def test_streaming_gives_the_same_text_and_usage(server, videos):
    stream = ask(server, videos[0].id, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text(ask(server, videos[0].id))
    assert {chunk.model for chunk in chunks} == {videos[0].id}
    assert chunks[-1].usage.prompt_tokens == ask(server, videos[0].id).usage.prompt_tokens


def test_completions_answer_too(server, videos):
    answers = [
        server.client.completions.create(model=model, prompt="The video", **GREEDY).choices[0].text
        for model in ("base", videos[0].id, videos[1].id)
    ]
    assert len(set(answers)) == 3


def test_frames_in_context_on_request(server, videos):
    frames = ask(server, videos[0].id, extra_body={"f2l": {"mode": "frames"}})
    adapter = ask(server, videos[0].id)
    details = videos[0].model_extra["f2l"]
    assert frames.usage.prompt_tokens >= adapter.usage.prompt_tokens + details["visual_tokens"]
    assert frames.model == videos[0].id


def test_two_videos_in_one_batch_two_hundred_times_never_crossed(server, videos):
    models = [videos[0].id, videos[1].id, "base"]
    expected = {model: text(ask(server, model)) for model in models}

    async def one(client, model):
        response = await client.chat.completions.create(model=model, messages=QUESTION, **GREEDY)
        return model, text(response)

    async def all_at_once():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, models[i % 3]) for i in range(600)))

    answers = asyncio.run(all_at_once())
    assert [(model, answer) for model, answer in answers if answer != expected[model]] == []
    assert sum(model == videos[0].id for model, _ in answers) == 200


def test_models_lists_base_and_ready_videos(server, videos):
    cards = {card.id: card for card in server.client.models.list().data}
    for card in (cards[videos[0].id], server.client.models.retrieve(videos[0].id)):
        assert (card.id, card.model_extra["parent"]) == (videos[0].id, "base")
        assert card.model_extra["name"] == videos[0].filename
    assert not any(name.startswith("f2l-") for name in cards)


def test_an_adapters_own_name_is_not_a_model(server, videos):
    ask(server, videos[0].id)
    with pytest.raises(openai.NotFoundError):
        ask(server, videos[0].model_extra["f2l"]["adapter"])


def test_no_content_part_reaches_an_adapter_by_its_name(server, videos):
    """vLLM takes an adapter that has the name of a part's type, and a type that it does not know if there is a uuid."""
    ask(server, videos[0].id)
    name = videos[0].model_extra["f2l"]["adapter"]
    question = {"type": "text", "text": QUESTION[0]["content"]}
    crafted = {"type": name, "uuid": "x", "tool_reference": "", "name": ""}
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, "base", [{"role": "user", "content": [question, crafted]}])
    assert error.value.code == "unsupported_part"


def test_a_question_does_not_choose_how_media_are_decoded(server, videos):
    for options in ({"media_io_kwargs": {"video": {"video_backend": "opencv"}}}, {"mm_processor_kwargs": {"fps": 100}}):
        with pytest.raises(openai.BadRequestError, match="operator's to say") as error:
            ask(server, videos[0].id, extra_body={"f2l": {"mode": "frames"}, **options})
        assert error.value.code == "unsupported_field"


def test_the_exported_adapter_names_its_base_and_answers_the_same_in_plain_peft(server, videos, tmp_path):
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    archive = httpx.get(f"{server.url}/v1/files/{videos[0].id}/adapter").content
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(tmp_path, filter="data")
    (directory,) = tmp_path.iterdir()
    named = PeftConfig.from_pretrained(str(directory)).base_model_name_or_path
    base = AutoModelForImageTextToText.from_pretrained(named, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(directory))
    processor = AutoProcessor.from_pretrained(named)
    message = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    inputs = processor.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    served = ask(server, videos[0].id, logprobs=True, extra_body={"return_token_ids": True})
    assert served.choices[0].model_extra["token_ids"] == output.tolist()


def test_files_of_the_same_bytes_share_an_adapter_until_the_last_is_deleted(server, clips):
    first, second = server.upload(clips[2]), server.upload(clips[2])
    assert first.id != second.id
    name = first.model_extra["f2l"]["adapter"]
    assert second.model_extra["f2l"]["adapter"] == name
    answer = text(ask(server, first.id))
    assert server.client.files.delete(first.id).deleted
    assert text(ask(server, second.id)) == answer
    with pytest.raises(openai.NotFoundError) as error:
        ask(server, first.id)
    assert error.value.code == "video_not_found"
    server.client.files.delete(second.id)
    deadline = time.monotonic() + 60
    left = [server.adapter_folder(name)]
    left += [p for p in (server.home / "videos").rglob("*") if p.is_file() and p.read_bytes() == clips[2].read_bytes()]
    while any(path.exists() for path in left) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [path for path in left if path.exists()] == []
    again = server.upload(clips[2])  # the same name and weights come back
    assert text(ask(server, again.id)) == answer


def test_a_question_waits_for_its_video(server, clips):
    file = server.client.files.create(file=clips[3], purpose="vision")
    answer = ask(server, file.id)  # at once: no polling before it
    assert server.client.files.retrieve(file.id).status == "processed"
    assert text(answer) == text(ask(server, file.id))


def test_a_question_that_may_not_wait_is_told(server, slow_clip):
    file = server.client.files.create(file=slow_clip, purpose="vision")
    with pytest.raises(openai.ConflictError) as error:
        ask(server, file.id, extra_headers={"X-F2L-Wait": "none"})
    assert error.value.code == "video_not_ready"
    with pytest.raises(openai.ConflictError):
        ask(server, file.id, extra_body={"f2l": {"wait": 0.01}})
    assert text(ask(server, file.id))


def test_a_damaged_adapter_is_made_again_before_it_answers(server, clips):
    file = server.upload(clips[4])
    name = file.model_extra["f2l"]["adapter"]
    weights = server.adapter_folder(name) / WEIGHTS_FILE
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 0xFF]))
    assert text(ask(server, file.id)) not in ("", text(ask(server, "base")))
    assert (server.adapter_folder(name) / WEIGHTS_FILE).read_bytes() == sound
    assert not weights.exists()


def test_progress_events_end_with_the_result(server, clips):
    file = server.client.files.create(file=clips[5], purpose="vision")
    with httpx.stream("GET", f"{server.url}/v1/files/{file.id}/events", timeout=60) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert '"status": "processed"' in lines[-2]
    assert lines[-1] == "data: [DONE]"


def test_pages_of_files(server, videos):
    everything = [file.id for file in server.client.files.list(limit=2)]  # the client follows the cursor
    assert len(everything) == len(set(everything)) >= 2
    assert {video.id for video in videos} <= set(everything)
    assert [file.id for file in server.client.files.list(order="asc")] == everything[::-1]


def test_metrics_and_health(server, videos):
    ask(server, videos[0].id)
    metrics = httpx.get(f"{server.url}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("f2l_"))
    assert float(lines['f2l_questions_total{mode="adapter",outcome="answered"}']) > 200
    assert float(lines["f2l_visual_tokens_avoided_total"]) > 0
    assert float(lines["f2l_adapters_resident"]) >= 2
    assert float(lines["f2l_adapter_leases"]) == 0
    assert "vllm:" in metrics
    assert "f2l-" not in metrics  # the names of adapters: they are nobody's to know, and there is no end of them
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/ready").json() == {"ready": True, "engine": True, "workers": True, "catalog": True}


@contextmanager
def hanging_inspectors(server):
    """What the API server inspects takes for ever: its decoding processes are stopped."""
    stopped = [pid for pid, command in server.descendants().items() if "decoder_child" in command]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_uploads_that_wait_to_be_inspected_hold_up_no_question(server, videos, clips):
    def create(_):
        return server.client.files.create(file=clips[0], purpose="vision")

    with ThreadPoolExecutor(40) as threads:
        for file in threads.map(create, range(4)):  # inspectors are started when there is something to inspect
            server.client.files.delete(file.id)
        with hanging_inspectors(server):
            uploads = [threads.submit(create, i) for i in range(40)]
            deadline = time.monotonic() + 60
            while len(list((server.home / "tmp").glob("*/*"))) < 40 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert text(ask(server, videos[1].id))
            assert not any(upload.done() for upload in uploads)
        for upload in uploads:
            server.client.files.delete(upload.result().id)


def test_a_client_that_goes_away_gives_its_adapter_back(server, videos):
    long = {"max_tokens": 400, "extra_body": {"ignore_eos": True}, "stream": True}
    for _ in range(5):
        stream = server.client.chat.completions.create(model=videos[0].id, messages=QUESTION, **long)
        next(iter(stream))
        assert metric(server.url, "f2l_adapter_leases") == 1
        stream.close()
        deadline = time.monotonic() + 60
        while metric(server.url, "f2l_adapter_leases") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert metric(server.url, "f2l_adapter_leases") == 0


def test_a_video_deleted_in_mid_answer_answers_to_the_end(server, tmp_path):
    file = server.upload(write_video(tmp_path / "only-here.mp4", frames=33))
    long = {"temperature": 0, "max_tokens": 300, "extra_body": {"ignore_eos": True}}
    whole = server.client.chat.completions.create(model=file.id, messages=QUESTION, **long)
    stream = server.client.chat.completions.create(model=file.id, messages=QUESTION, stream=True, **long)
    chunks = [next(iter(stream))]
    server.client.files.delete(file.id)
    chunks += list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text(whole)
    deadline = time.monotonic() + 60
    adapter = server.adapter_folder(file.model_extra["f2l"]["adapter"])
    while adapter.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not adapter.exists()


def test_the_runtime_update_endpoints_stay_closed(server):
    for route in ("load_lora_adapter", "unload_lora_adapter"):
        body = {"lora_name": "x", "lora_path": str(server.home)}
        assert httpx.post(f"{server.url}/v1/{route}", json=body).status_code == 404
