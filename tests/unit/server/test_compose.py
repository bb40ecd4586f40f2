"""Composing adapters that exist: what is chosen, kept and thrown away, over a real store, catalog and registry."""

import asyncio
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.tables import Upload
from f2l_vllm.hypernetwork.adapter import WEIGHTS_FILE, save_tensors
from f2l_vllm.server.chat.compose import AdapterChunks, Composer, PartGone, PartLost
from f2l_vllm.server.chat.request import Span
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.registry import Registry
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.store import Store
from tests.support.engine import Engine, settle

RANK = 2
SHAPES = BaseShapes(layers=1, modules={"down_proj": (6, 4)})
CHUNKS = ((0.0, 10.0), (10.0, 20.033), (20.033, 25.0))


class WatchedStore(Store):
    """Calls `on_verify` with an adapter's name after it has been checked."""

    def on_verify(self, name):
        pass

    def verify_adapter(self, name):
        manifest = super().verify_adapter(name)
        self.on_verify(name)
        return manifest


class Bench:
    def __init__(self, home, keep=10, max_rank=8 * RANK):
        self.store, self.catalog, self.engine = WatchedStore(home), Catalog(f"sqlite:///{home / 'catalog'}"), Engine()
        self.files = {}
        self.start(keep, max_rank)

    def start(self, keep=10, max_rank=8 * RANK):
        registry = Registry(
            {}, self.engine, self.store, base_model="base", host_slots=64, wanted=self.catalog.refers_to
        )
        self.composer = Composer(
            self.catalog,
            self.store,
            registry,
            shapes=SHAPES,
            base_name="base",
            chunk_rank=RANK,
            max_rank=max_rank,
            keep=keep,
        )

    def video(self, number, chunks=1):
        """A ready video's adapter; every chunk and number differs, the bias is shared."""
        name, key = f"f2l-video{number}", SHAPES.key(0, "down_proj", "A")
        generator = torch.Generator().manual_seed(number)
        a_RI, b_OR = torch.randn(RANK * chunks, 6, generator=generator), torch.randn(4, RANK * chunks)
        tensors = {
            key: torch.cat([a_RI, torch.ones(RANK, 6)]).bfloat16(),
            key.replace("lora_A", "lora_B"): torch.cat([b_OR, torch.ones(4, RANK)], dim=1).bfloat16(),
        }
        self.store.publish_adapter(name, lambda directory: save_tensors(tensors, directory, "base"), {})
        file = self.catalog.add_file(Upload("a", f"{number:064x}", 1, "v", "vision"), name, queue_limit=100)
        self.files[name] = file.id
        self.catalog.claim_jobs(1)
        return self.catalog.finish_job(name, rank=RANK * (chunks + 1), size=1, info=AdapterInfo(visual_tokens=10))

    def delete(self, name):
        self.catalog.remove_file(self.files[name], "a")

    def weights(self, name):
        return load_file(self.store.adapter_path(name) / WEIGHTS_FILE)

    def adapters_on_disk(self):
        return {path.name for path in (self.store.home / "adapters").iterdir()}


def whole(record):
    return AdapterChunks(record, tuple(range(record.rank // RANK - 1)), ((0.0, 1.0),))


def test_chunks_stand_in_order_each_once_and_the_bias_at_the_end(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        one, long = bench.video(1), bench.video(2, chunks=3)
        parts = [AdapterChunks(long, (2, 0), ((0.0, 1.0),)), whole(one), whole(long)]
        lease = await bench.composer.lease(parts)
        weights, key = bench.weights(lease.adapter.name), SHAPES.key(0, "down_proj", "A")
        of_one, of_long = (bench.weights(r.name)[key].split(RANK) for r in (one, long))
        expected = [of_long[2], of_long[0], of_one[0], of_long[1], of_one[1]]
        assert torch.equal(weights[key], torch.cat(expected))
        assert (lease.adapter.rank, lease.adapter.composed) == (5 * RANK, True)
        same = await bench.composer.lease([whole(long)])
        assert same.adapter == long  # nothing to compose

    asyncio.run(scenario())


def test_only_so_many_compositions_are_kept(tmp_path):
    async def scenario():
        bench = Bench(tmp_path, keep=2)
        videos = [bench.video(number) for number in range(4)]
        names = []
        for other in videos[1:]:
            lease = await bench.composer.lease([whole(videos[0]), whole(other)])
            names.append(lease.adapter.name)
            lease.release()
            await settle()
        assert bench.adapters_on_disk() == {record.name for record in videos} | set(names[1:])
        assert bench.catalog.adapter(names[0]) is None
        again = await bench.composer.lease([whole(videos[0]), whole(videos[1])])
        assert again.adapter.name == names[0]  # the same weights, under a fresh int id
        assert again.adapter.id > max(record.id for record in videos)

    asyncio.run(scenario())


def test_a_part_that_is_deleted_while_it_is_composed_leaves_nothing(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        one, two = bench.video(1), bench.video(2)
        bench.store.on_verify = lambda name: bench.delete(one.name) if name == two.name else None
        with pytest.raises(PartGone):
            await bench.composer.lease([whole(one), whole(two)])
        assert bench.adapters_on_disk() == {one.name, two.name}  # deleting the files of `one` is the service's part

    asyncio.run(scenario())


def test_a_damaged_composition_is_composed_again_and_a_damaged_part_is_named(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        one, two = bench.video(1), bench.video(2)
        parts = [whole(one), whole(two)]
        record = (await bench.composer.lease(parts)).adapter
        path = bench.store.adapter_path(record.name) / WEIGHTS_FILE
        sound = path.read_bytes()
        path.write_bytes(b"damaged")
        bench.start()  # as after a restart: nothing is resident
        assert (await bench.composer.lease(parts)).adapter == record
        assert path.read_bytes() == sound
        bench.start()
        path.write_bytes(b"damaged")
        (bench.store.adapter_path(two.name) / WEIGHTS_FILE).write_bytes(b"damaged")
        with pytest.raises(PartLost) as lost:
            await bench.composer.lease(parts)
        assert lost.value.record == two

    asyncio.run(scenario())


def test_one_who_goes_away_stops_the_composition_for_nobody(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        parts = [whole(bench.video(1)), whole(bench.video(2))]
        first, second = (asyncio.create_task(bench.composer.lease(parts)) for _ in range(2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).adapter.rank == 3 * RANK
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(scenario())


def long_video(spans=CHUNKS):
    times = (0.5, 5.5, 10.5, 15.5, 20.5)
    info = AdapterInfo(spans=spans, duration_s=25.0, visual_tokens=50, timestamps=times)
    return SimpleNamespace(name="f2l-long", rank=4 * RANK, info=info)


@pytest.mark.parametrize(
    ("span", "chunks", "covered", "tokens"),
    [
        (None, (0, 1, 2), ((0.0, 25.0),), 50),
        (Span(0, 10), (0,), ((0.0, 10.0),), 20),
        (Span(9, 11), (0, 1), ((0.0, 20.033),), 40),
        (Span(20, 25), (2,), ((20.033, 25.0),), 10),  # 0.033 s of a chunk is no reason to take it
        (Span(20, 20.03), (1,), ((10.0, 20.033),), 20),  # unless there is nothing else
        (Span(12, math.inf), (1, 2), ((10.0, 25.0),), 30),
    ],
)
def test_a_span_takes_the_chunks_it_overlaps(tmp_path, span, chunks, covered, tokens):
    async def scenario():
        part = Bench(tmp_path).composer.choose(long_video(), span, "file-1")
        assert (part.chunks, part.covered, part.visual_tokens) == (chunks, covered, tokens)

    asyncio.run(scenario())


def test_spans_that_are_not_there_and_too_many_chunks_say_what_there_is(tmp_path):
    async def scenario():
        composer = Bench(tmp_path, max_rank=3 * RANK).composer
        with pytest.raises(APIError, match=r"0 to 10, 10 to 20.033, 20.033 to 25 s") as error:
            composer.choose(long_video(), Span(25, 30), "file-1")
        assert error.value.code == "span_not_available"
        with pytest.raises(APIError, match="one pass"):
            composer.choose(long_video(spans=()), Span(0, 3), "file-1")
        with pytest.raises(APIError, match=r"2 videos of 3 chunks need LoRA rank 8, and this server has 6") as error:
            composer.check(3, 2)
        assert error.value.code == "too_many_videos"

    asyncio.run(scenario())
