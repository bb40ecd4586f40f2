"""From a question's videos to what answers it, over a real catalog, store and registry; this test is the worker."""

import asyncio
import base64
import contextvars
import hashlib
import math
import time
from http import HTTPStatus

import pytest
import torch

from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.tables import Upload
from f2l_vllm.hypernetwork.adapter import WEIGHTS_FILE, save_tensors
from f2l_vllm.server.chat.compose import Composer
from f2l_vllm.server.chat.request import Span, Video
from f2l_vllm.server.chat.resolve import Asking
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.local_videos import video_at
from f2l_vllm.server.registry import Registry
from f2l_vllm.server.streams.live import LiveStreams
from f2l_vllm.server.videos import by_url
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.settings import Settings
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.address import Revisions
from f2l_vllm.store.store import Store
from tests.support.engine import Engine
from tests.support.videos import write_video

RANK, CHUNK = 2, 10.0
SHAPES = BaseShapes(layers=1, modules={"down_proj": (6, 4)})
T = "tenant"


class Bench:
    """A server's videos without vLLM in front; `works` says whether jobs are done."""

    def __init__(self, folder, max_rank=8 * RANK):
        home = folder / "home"
        self.store, self.catalog = Store(home), Catalog(f"sqlite:///{folder / 'catalog.sqlite3'}")
        registry = Registry({}, Engine(), self.store, base_model="base", host_slots=64, wanted=self.catalog.refers_to)
        self.revisions, self.settings = Revisions("base", "one"), Settings(home=home, url_seconds=500)
        self.service = VideoService(
            self.settings, self.revisions, self.catalog, self.store, registry, None, lambda: False
        )
        self.catalog.is_appointed(self.catalog.revision)
        self.composer = Composer(
            self.catalog,
            self.store,
            registry,
            shapes=SHAPES,
            base_name="base",
            chunk_rank=RANK,
            max_rank=max_rank,
            keep=100,
        )
        self.asking = Asking(self.service, self.composer, LiveStreams(self.service))
        self.works, self.jobs = True, 0

    async def work(self):
        while True:
            for job in self.catalog.claim_jobs(8) if self.works else ():
                self.jobs += 1
                self.finish(job.adapter_name)
            await asyncio.sleep(0.01)

    def finish(self, name, chunks=2):
        key = SHAPES.key(0, "down_proj", "A")
        generator = torch.Generator().manual_seed(int(name[-8:], 16))
        tensors = {
            key: torch.cat([torch.randn(RANK * chunks, 6, generator=generator), torch.ones(RANK, 6)]).bfloat16(),
            key.replace("lora_A", "lora_B"): torch.ones(4, RANK * (chunks + 1)).bfloat16(),
        }
        self.store.publish_adapter(name, lambda directory: save_tensors(tensors, directory, "base"), {})
        spans = tuple((CHUNK * i, CHUNK * (i + 1)) for i in range(chunks))
        info = AdapterInfo(visual_tokens=20, timestamps=(1.0, 11.0), spans=spans, duration_s=CHUNK * chunks)
        self.catalog.finish_job(name, rank=RANK * (chunks + 1), size=1, info=info)

    async def upload(self, text):
        temporary = self.store.temporary()
        temporary.write_text(text)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        return await self.service.enter(temporary, Upload(T, sha256, len(text), "v.mp4", "vision"))

    async def ask(self, *videos, wait=20.0, tenant=T):
        source = await self.asking.adapter(await self.asking.find(videos, tenant), tenant, wait)
        source.release()
        return source.details

    def files(self, tenant=T):
        return self.catalog.files(tenant, after=None, limit=100, descending=False)[0]

    def left_over(self):
        return list((self.store.home / "tmp").glob("*/*"))


def run(scenario, folder, **options):
    async def whole():
        bench = Bench(folder, **options)
        worker = asyncio.create_task(bench.work())
        try:
            await scenario(bench)
        finally:
            worker.cancel()

    asyncio.run(whole())


@pytest.fixture(scope="module")
def uris(tmp_path_factory):
    """Two films as data URIs; the first in two spellings."""
    folder = tmp_path_factory.mktemp("uris")
    paths = [write_video(folder / f"{frames}.mp4", frames=frames) for frames in (5, 9)]
    first, second = (base64.b64encode(path.read_bytes()).decode() for path in paths)
    return f"data:video/mp4;base64,{first}", f"data:;base64,{first}", f"data:video/mp4;base64,{second}"


def test_the_same_bytes_by_any_address_are_one_file_and_one_job_for_all_who_ask(tmp_path, uris):
    async def scenario(bench):
        asked = [Video(url=uris[index % 2]) for index in range(30)]
        answers = await asyncio.gather(*(bench.ask(video) for video in asked))
        (file,) = bench.files()
        assert {answer["videos"][0]["file_id"] for answer in answers} == {file.id}
        assert bench.jobs == 1
        assert (file.purpose, file.idle_seconds) == ("user_data", 500)
        assert file.expires_at == pytest.approx(time.time() + 500, abs=60)
        assert max(answer["waited_seconds"] for answer in answers) > 0
        assert (await bench.ask(Video(url=uris[0])))["waited_seconds"] == 0
        assert len(bench.files()) == 1
        await bench.ask(Video(url=uris[0]), tenant="other")  # a file of their own, the same adapter
        assert (len(bench.files("other")), bench.jobs) == (1, 1)
        await bench.service.remove(file.id, T)
        await bench.ask(Video(url=uris[0]))
        assert [again.id != file.id for again in bench.files()] == [True]
        assert bench.left_over() == []

    run(scenario, tmp_path)


def test_what_is_no_video_leaves_nothing(tmp_path):
    async def scenario(bench):
        for url, code, status in (
            ("data:,text", "not_a_video", HTTPStatus.BAD_REQUEST),
            ("https://videos.example/v.mp4", "url_not_allowed", HTTPStatus.BAD_REQUEST),
            ("data:;base64,!", "invalid_url", HTTPStatus.BAD_REQUEST),
        ):
            for _ in range(2):
                with pytest.raises(APIError) as error:
                    await bench.ask(Video(url=url))
                assert (error.value.code, error.value.status) == (code, status)
        assert (bench.files(), bench.left_over()) == ([], [])

    run(scenario, tmp_path)


def test_one_who_goes_away_while_a_video_is_fetched_stops_it_for_nobody(tmp_path, uris):
    async def scenario(bench):
        first, second = (asyncio.create_task(bench.ask(Video(url=uris[2]))) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        assert (await second)["rank"] == 3 * RANK
        assert len(bench.files()) == 1

    run(scenario, tmp_path)


def test_who_may_not_wait_is_told_the_file_and_the_work_goes_on(tmp_path, uris):
    async def scenario(bench):
        bench.works = False
        with pytest.raises(APIError) as error:
            await bench.ask(Video(url=uris[0]), wait=0)
        (file,) = bench.files()
        assert (error.value.code, error.value.headers["X-F2L-File"]) == ("video_not_ready", file.id)
        bench.works = True
        assert (await bench.ask(Video(file.id)))["rank"] == 3 * RANK
        assert bench.jobs == 1

    run(scenario, tmp_path)


def test_videos_and_spans_are_composed_and_described_in_the_order_named(tmp_path):
    async def scenario(bench):
        one, two = await bench.upload("one"), await bench.upload("two")
        details = await bench.ask(Video(two.id, span=Span(CHUNK, math.inf)), Video(one.id))
        assert details["rank"] == 4 * RANK
        assert [video["file_id"] for video in details["videos"]] == [two.id, one.id]
        assert [video["covered"] for video in details["videos"]] == [[[10, 20]], [[0, 20]]]
        assert details["visual_tokens_avoided"] == 10 + 20
        halves = await bench.ask(Video(one.id, span=Span(0, 3)), Video(one.id, span=Span(15, 16)))
        whole = await bench.ask(Video(one.id))
        assert halves["rank"] == whole["rank"]
        assert whole["adapter"] == bench.revisions.name(one.sha256)
        with pytest.raises(APIError) as error:
            await bench.ask(Video(one.id), Video(two.id), tenant="other")
        assert error.value.code == "video_not_found"

    run(scenario, tmp_path)


def test_too_many_are_refused_before_anything_is_waited_for(tmp_path):
    async def scenario(bench):
        bench.works = False
        files = [await bench.upload(text) for text in ("one", "two", "three")]
        with pytest.raises(APIError) as error:
            await bench.ask(*(Video(file.id) for file in files), wait=1000)
        assert error.value.code == "too_many_videos"
        bench.works = True
        with pytest.raises(APIError) as error:  # two videos of two chunks: known when they are ready
            await bench.ask(Video(files[0].id), Video(files[1].id))
        assert (error.value.code, f"rank {5 * RANK}" in error.value.message) == ("too_many_videos", True)

    run(scenario, tmp_path, max_rank=3 * RANK)


def test_more_addresses_than_there_is_room_for_are_not_fetched(tmp_path, uris):
    async def scenario(bench):
        with pytest.raises(APIError) as error:
            await bench.ask(Video(url=uris[0]), Video(url="data:,text"), Video(url=uris[2]))
        assert error.value.code == "too_many_videos"
        assert bench.files() == []

    run(scenario, tmp_path, max_rank=3 * RANK)


def test_a_video_by_address_that_failed_for_no_fault_of_its_own_is_tried_again_later(tmp_path, uris, monkeypatch):
    async def scenario(bench):
        bench.works = False

        async def ask_and_fail(code):
            with pytest.raises(APIError):
                await bench.ask(Video(url=uris[0]), wait=0)
            for job in bench.catalog.claim_jobs(8):
                bench.catalog.fail_job(job.adapter_name, code, "it did not work")

        await ask_and_fail("not_enough_memory")
        for _ in range(2):
            with pytest.raises(APIError, match="it did not work"):
                await bench.ask(Video(url=uris[0]))
        monkeypatch.setattr(by_url, "_AGAIN_SECONDS", 0.0)
        await ask_and_fail("unsupported_codec")  # the new one's
        assert len(bench.files()) == 2
        with pytest.raises(APIError, match="it did not work"):
            await bench.ask(Video(url=uris[0]))  # a fault of the video's is for good
        assert len(bench.files()) == 2

    run(scenario, tmp_path)


def test_damaged_parts_are_made_again(tmp_path):
    async def scenario(bench):
        one, two = await bench.upload("one"), await bench.upload("two")
        before = await bench.ask(Video(one.id), Video(two.id))
        bench.store.remove_adapter(before["adapter"])
        weights = bench.store.adapter_path(bench.revisions.name(two.sha256)) / WEIGHTS_FILE
        sound = weights.read_bytes()
        weights.write_bytes(b"damaged")
        third = await bench.upload("three")
        again = await bench.ask(Video(two.id), Video(third.id))
        assert again["waited_seconds"] > 0
        assert weights.read_bytes() == sound
        assert bench.jobs == 4

    run(scenario, tmp_path)


def test_a_deleted_part_takes_the_composition_with_it(tmp_path):
    async def scenario(bench):
        one, two = await bench.upload("one"), await bench.upload("two")
        name = (await bench.ask(Video(one.id), Video(two.id)))["adapter"]
        await asyncio.sleep(0.05)
        await bench.service.remove(two.id, T)
        assert not bench.store.adapter_path(name).exists()
        assert bench.catalog.adapter(name) is None
        with pytest.raises(APIError) as error:
            await bench.ask(Video(one.id), Video(two.id))
        assert error.value.code == "video_not_found"
        assert (await bench.ask(Video(one.id)))["rank"] == 3 * RANK

    run(scenario, tmp_path)


def test_frames_need_no_adapter_and_are_the_bytes_uploaded(tmp_path):
    async def scenario(bench):
        bench.works = False
        file = await bench.upload("bytes")
        named = await bench.asking.find([Video(file.id)], T)
        address = (await bench.asking.frames(named))[Video(file.id)]
        assert video_at(address).path.read_bytes() == b"bytes"
        assert contextvars.Context().run(video_at, address) is None  # in no other request
        with pytest.raises(APIError) as error:
            await bench.asking.find([Video("file-0")], T)
        assert error.value.code == "video_not_found"

    run(scenario, tmp_path)
