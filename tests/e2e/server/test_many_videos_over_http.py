"""Questions about several videos at once, about videos named by address, and how an answer says where it is from."""

import asyncio
import base64
import re

import openai
import pytest
import torch
from openai import AsyncOpenAI
from safetensors.torch import load_file

from f2l_vllm.client import metric
from f2l_vllm.hypernetwork.adapter import WEIGHTS_FILE, apply_adapter
from f2l_vllm.hypernetwork.internalizer import Internalizer
from tests.support.videos import write_video

QUESTION = "What is shown in the video?"
GREEDY = {"temperature": 0, "max_tokens": 12}


def part(file_id, **span):
    return {"type": "file", "file": {"file_id": file_id, **({"f2l": span} if span else {})}}


def url_part(path):
    return {"type": "video_url", "video_url": {"url": data_uri(path)}}


def data_uri(path):
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def about(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


def ask(server, messages, model="base", f2l=None, **options):
    extra = {"extra_body": {"f2l": f2l}} if f2l else {}
    return server.client.chat.completions.create(model=model, messages=messages, **GREEDY, **extra, **options)


def text(response):
    return response.choices[0].message.content


def source(response):
    return response.model_extra["f2l"]


@pytest.fixture(scope="module")
def upload(server, tmp_path_factory):
    """`upload(frames)` makes a ready video of this length that no other test has."""
    folder = tmp_path_factory.mktemp("many")

    def one(frames):
        path = write_video(folder / f"{frames}.mp4", frames=frames, fps=7)
        return server.upload(path)

    return one


@pytest.fixture(scope="module")
def videos(server, upload):
    """Three ready videos."""
    return [upload(frames) for frames in (15, 31, 44)]


def test_two_videos_answer_as_transformers_does_from_the_composed_factors(server, videos, hypernetwork_model):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    ids = [videos[1].id, videos[0].id]
    response = ask(server, about(*map(part, ids)), extra_body={"return_token_ids": True}, logprobs=True)
    internalizer = Internalizer.load(hypernetwork_model, hypernetwork_model / "hypernetwork")
    rank, factors = internalizer.hyper.config.rank, []
    for file_id in ids:
        path = server.home.parent / f"{file_id}.mp4"
        path.write_bytes(server.client.files.content(file_id).read())
        alone = internalizer.internalize(path)
        factors.append({name: (a[:, :rank], b[:, :rank]) for name, (a, b) in alone.factors.items()})
    composed = internalizer.hyper.compose(factors).to(dtype=torch.bfloat16).to(dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(hypernetwork_model, dtype=torch.float32)
    message = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    inputs = AutoProcessor.from_pretrained(hypernetwork_model).apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with apply_adapter(model, composed):
        output = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert response.choices[0].model_extra["token_ids"] == output.tolist()
    assert response.usage.prompt_tokens == inputs["input_ids"].shape[1]
    weights = load_file(server.adapter_folder(source(response)["adapter"]) / WEIGHTS_FILE)
    assert source(response)["rank"] == 3 * rank
    for place, file_id in enumerate(ids):  # in the order named
        own = next(video.model_extra["f2l"]["adapter"] for video in videos if video.id == file_id)
        for key, tensor in load_file(server.adapter_folder(own) / WEIGHTS_FILE).items():
            axis = 0 if "lora_A" in key else 1
            block = weights[key].narrow(axis, place * rank, rank)
            assert torch.equal(block, tensor.narrow(axis, 0, rank))


def test_the_answer_says_what_it_is_from(server, videos):
    first, second = videos[0].model_extra["f2l"], videos[1].model_extra["f2l"]
    both = source(ask(server, about(part(videos[0].id), part(videos[1].id))))
    assert both["mode"] == "adapter"
    assert [video["file_id"] for video in both["videos"]] == [videos[0].id, videos[1].id]
    assert [video["adapter"] for video in both["videos"]] == [first["adapter"], second["adapter"]]
    assert [video["covered"] for video in both["videos"]] == [
        [[0, pytest.approx(first["duration_s"], abs=1e-3)]],
        [[0, pytest.approx(second["duration_s"], abs=1e-3)]],
    ]
    assert both["visual_tokens_avoided"] == first["visual_tokens"] + second["visual_tokens"]
    assert both["waited_seconds"] == 0
    other_order = source(ask(server, about(part(videos[1].id), part(videos[0].id))))
    assert other_order["adapter"] != both["adapter"]
    named = source(ask(server, about(part(videos[1].id)), model=videos[0].id))
    assert named == both
    alone = source(ask(server, about(part(videos[0].id), part(videos[0].id))))
    assert alone["adapter"] == first["adapter"]
    assert "f2l" not in (ask(server, about()).model_extra or {})


def test_a_stream_says_it_with_its_usage(server, videos):
    messages = about(part(videos[0].id), part(videos[1].id))
    chunks = list(ask(server, messages, stream=True, stream_options={"include_usage": True}))
    whole = ask(server, messages)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text(whole)
    assert [chunk.model_extra["f2l"] for chunk in chunks if "f2l" in chunk.model_extra] == [source(whole)]
    assert chunks[-1].usage == whole.usage
    assert not any("f2l" in chunk.model_extra for chunk in ask(server, messages, stream=True))


def test_several_answers_at_once(server, videos):
    messages = about(part(videos[0].id), part(videos[1].id))
    options = {"n": 3, "temperature": 1.5, "seed": 1, "max_tokens": 6, "extra_body": {"ignore_eos": True}}
    response = server.client.chat.completions.create(model="base", messages=messages, **options)
    assert len({choice.message.content for choice in response.choices}) == 3
    assert response.usage.completion_tokens == 3 * 6
    assert response.usage.prompt_tokens == ask(server, messages).usage.prompt_tokens
    assert source(response) == source(ask(server, messages))


def test_files_of_every_role_count(server, videos):
    messages = [{"role": "system", "content": [part(videos[1].id), {"type": "text", "text": "Be brief."}]}]
    response = ask(server, [*messages, *about(part(videos[0].id))])
    assert [video["file_id"] for video in source(response)["videos"]] == [videos[1].id, videos[0].id]


def test_more_videos_than_the_rank_has_room_for_are_refused(server, videos, upload):
    too_many = [*videos, upload(52)]
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, about(*(part(video.id) for video in too_many)))
    assert error.value.code == "too_many_videos"
    assert "LoRA rank 20, and this server has 16" in error.value.message
    assert "--max-chunks 4" in error.value.message
    assert text(ask(server, about(*(part(video.id) for video in videos))))


def test_many_who_ask_at_once_share_one_composition(server, videos):
    messages = about(part(videos[2].id), part(videos[0].id))
    before = metric(server.url, "f2l_composed_total")

    async def all_at_once():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            return await asyncio.gather(*(create(model="base", messages=messages, **GREEDY) for _ in range(40)))

    answers = asyncio.run(all_at_once())
    assert len({text(answer) for answer in answers}) == 1
    assert metric(server.url, "f2l_composed_total") == before + 1
    assert metric(server.url, "f2l_adapter_leases") == 0


def test_a_composition_leaves_with_the_first_of_its_videos(server, videos, upload):
    mortal = upload(60)
    messages = about(part(videos[0].id), part(mortal.id))
    name = source(ask(server, messages))["adapter"]
    assert server.adapter_folder(name).exists()
    server.client.files.delete(mortal.id)
    with pytest.raises(openai.NotFoundError) as error:
        ask(server, messages)
    assert (error.value.code, mortal.id in error.value.message) == ("video_not_found", True)
    assert not server.adapter_folder(name).exists()
    assert text(ask(server, about(part(videos[0].id))))


def test_a_damaged_part_is_made_again_before_it_is_composed(server, videos, upload):
    fresh = upload(70)
    name = fresh.model_extra["f2l"]["adapter"]
    weights = server.adapter_folder(name) / WEIGHTS_FILE
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 0xFF]))
    response = ask(server, about(part(fresh.id), part(videos[0].id)))
    assert (server.adapter_folder(name) / WEIGHTS_FILE).read_bytes() == sound
    assert source(response)["waited_seconds"] > 0


def test_frames_of_several_videos_and_both_at_once(server, videos):
    parts = [part(videos[0].id), part(videos[1].id)]
    tokens = sum(video.model_extra["f2l"]["visual_tokens"] for video in videos[:2])
    modes = {mode: ask(server, about(*parts), f2l={"mode": mode}) for mode in ("adapter", "frames", "both")}
    assert {source(response)["mode"] for response in modes.values()} == set(modes)
    assert [source(modes[mode])["visual_tokens"] for mode in modes] == [0, tokens, tokens]
    assert len({text(response) for response in modes.values()}) == 3
    for mode in ("frames", "both"):
        assert modes[mode].usage.prompt_tokens >= modes["adapter"].usage.prompt_tokens + tokens
        assert source(modes[mode])["visual_tokens_avoided"] == 0
        assert [video["file_id"] for video in source(modes[mode])["videos"]] == [videos[0].id, videos[1].id]
    assert "adapter" not in source(modes["frames"])
    assert source(modes["both"])["adapter"] == source(modes["adapter"])["adapter"]
    assert source(modes["adapter"])["visual_tokens_avoided"] == tokens


def another(film, path, mark):
    """The same film in other bytes: with a box at the end that every player skips."""
    path.write_bytes(film.read_bytes() + b"\0\0\0\x09free" + mark)
    return path


def test_frames_do_not_wait_for_the_adapter(server, slow_clip, tmp_path):
    file = server.client.files.create(file=another(slow_clip, tmp_path / "slow.mp4", b"1"), purpose="vision")
    with pytest.raises(openai.ConflictError):
        ask(server, about(part(file.id)), f2l={"wait": "none"})
    assert source(ask(server, about(part(file.id)), f2l={"wait": "none", "mode": "frames"}))["mode"] == "frames"


def test_structured_output_passes_through(server, videos):
    messages = about(part(videos[0].id), part(videos[1].id))
    for model, constraint in (("base", {"regex": "[0-9]{3} shapes"}), (videos[2].id, {"choice": ["left", "right"]})):
        response = ask(server, messages, model=model, extra_body={"structured_outputs": constraint})
        assert re.fullmatch("[0-9]{3} shapes|left|right", text(response))
    assert source(response)["rank"] == 16


def test_a_video_by_address_is_a_file_that_one_can_go_on_with(server, tmp_path):
    path = write_video(tmp_path / "inline.mp4", frames=23, fps=6)
    entered = metric(server.url, "f2l_uploads_total", reused="false")
    messages = about(url_part(path))

    async def all_at_once():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            return await asyncio.gather(*(create(model="base", messages=messages, **GREEDY) for _ in range(40)))

    answers = asyncio.run(all_at_once())
    (file_id,) = {source(answer)["videos"][0]["file_id"] for answer in answers}
    assert len({text(answer) for answer in answers}) == 1
    assert metric(server.url, "f2l_uploads_total", reused="false") == entered + 1
    file = server.client.files.retrieve(file_id)
    assert (file.purpose, file.status, file.bytes) == ("user_data", "processed", path.stat().st_size)
    assert 0 < file.expires_at - file.created_at <= 86400
    direct = ask(server, about(), model=file_id)
    assert text(direct) == text(answers[0])
    assert direct.usage.prompt_tokens == answers[0].usage.prompt_tokens
    assert max(source(answer)["waited_seconds"] for answer in answers) > 0
    server.client.files.delete(file_id)
    again = ask(server, messages)
    assert source(again)["videos"][0]["file_id"] != file_id
    assert text(again) == text(direct)


def test_bytes_in_a_file_part_become_a_file_of_that_name(server, tmp_path):
    path = write_video(tmp_path / "held.mp4", frames=25, fps=6)
    inline = {"type": "file", "file": {"filename": "held.mp4", "file_data": data_uri(path)}}
    answer = ask(server, about(inline))
    (file_id,) = (video["file_id"] for video in source(answer)["videos"])
    file = server.client.files.retrieve(file_id)
    assert (file.filename, file.purpose, file.status) == ("held.mp4", "user_data", "processed")
    assert 0 < file.expires_at - file.created_at <= 86400
    bare = {"type": "file", "file": {"file_data": data_uri(path).split(",")[1]}}
    for same in (url_part(path), bare):
        again = ask(server, about(same))
        assert (source(again)["videos"][0]["file_id"], text(again)) == (file_id, text(answer))
    frames = ask(server, about(inline), f2l={"mode": "frames"})
    assert frames.usage.prompt_tokens > answer.usage.prompt_tokens


def test_addresses_and_files_mix(server, videos, tmp_path):
    path = write_video(tmp_path / "inline.mp4", frames=27, fps=6)
    mixed = ask(server, about(url_part(path), part(videos[0].id)))
    ids = [video["file_id"] for video in source(mixed)["videos"]]
    assert ids[1] == videos[0].id
    assert text(ask(server, about(*map(part, ids)))) == text(mixed)
    both = ask(server, about(url_part(path), part(videos[0].id)), f2l={"mode": "both"})
    assert source(both)["adapter"] == source(mixed)["adapter"]
    assert both.usage.prompt_tokens > mixed.usage.prompt_tokens


def test_frames_of_an_address_leave_no_file(server, tmp_path):
    path = write_video(tmp_path / "seen.mp4", frames=29, fps=6)
    before = [file.id for file in server.client.files.list()]
    response = ask(server, about(url_part(path)), f2l={"mode": "frames"})
    assert (text(response) != "", source(response)["mode"]) == (True, "frames")
    assert [file.id for file in server.client.files.list()] == before


def test_an_address_that_may_not_be_waited_for_names_its_file_and_goes_on(server, slow_clip, tmp_path):
    path = another(slow_clip, tmp_path / "slow.mp4", b"2")
    with pytest.raises(openai.ConflictError) as error:
        ask(server, about(url_part(path)), f2l={"wait": "none"})
    assert error.value.code == "video_not_ready"
    assert int(error.value.response.headers["Retry-After"]) > 0
    file_id = error.value.response.headers["X-F2L-File"]
    assert file_id in error.value.message
    response = ask(server, about(part(file_id)))
    assert source(response)["videos"][0]["file_id"] == file_id


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"type": "video_url", "video_url": {"url": "https://videos.example/a.mp4"}}, "url_not_allowed"),
        ({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}, "url_not_allowed"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,!!"}}, "invalid_url"),
        ({"type": "video_url", "video_url": {"url": "data:text/plain,no%20video"}}, "not_a_video"),
        ({"type": "file", "file": {"file_data": "https://videos.example/a.mp4"}}, "invalid_url"),
        ({"type": "file", "file": {"file_data": "data:text/plain,no%20video"}}, "not_a_video"),
        ({"type": "input_video", "input_video": {"url": "data:,"}}, "unsupported_part"),
        ({"type": "file", "file": {"file_id": "file-0"}}, "video_not_found"),
        ({"type": "file", "file": {"file_id": "file-0", "f2l": {"begin": 3}}}, "invalid_span"),
        ({"type": "file", "file": {"file_id": "file-0", "span": [3, 4]}}, "invalid_request"),
    ],
)
def test_what_cannot_be_seen_is_refused(server, videos, wrong, code):
    with pytest.raises(openai.APIStatusError) as error:
        ask(server, about(part(videos[0].id), wrong))
    assert error.value.code == code
    assert len(error.value.message) > 20


def test_a_part_of_a_video_read_in_one_pass_cannot_be_had(server, videos):
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, about(part(videos[0].id, start=0, end=1)))
    assert error.value.code == "span_not_available"
    assert "--chunk-seconds" in error.value.message
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, about(part(videos[0].id, start=0, end=1)), f2l={"mode": "frames"})
    assert error.value.code == "span_not_available"
