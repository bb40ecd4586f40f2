"""The registry's rules, over a real store and an engine that only records."""

import asyncio
import random

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from f2l_vllm.catalog.tables import AdapterRecord
from f2l_vllm.engine.residency import FIRST_ADAPTER_ID
from f2l_vllm.server import metrics
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.registry import AdapterLost, Registry
from f2l_vllm.store.store import Store
from tests.support.engine import settle


class Engine:
    """Keeps what was added until it is removed; `busy` ids are still used, as by a question being aborted; `refuse` as
    many loads as it says."""

    def __init__(self, seconds=0.01):
        self.loaded, self.calls, self.refuse, self.busy, self.most = {}, [], 0, set(), 0
        self.seconds = seconds

    async def add_lora(self, request):
        self.calls.append(("add", request.lora_name, request.lora_int_id))
        await asyncio.sleep(self.seconds)
        if self.refuse:
            self.refuse -= 1
            raise RuntimeError("no room")
        assert request.lora_name not in self.loaded.values() or self.loaded.get(request.lora_int_id)
        self.loaded[request.lora_int_id] = request.lora_name
        self.most = max(self.most, len(self.loaded))
        return True

    async def list_loras(self):
        return set(self.loaded)

    async def remove_lora(self, int_id):
        self.calls.append(("remove", int_id))
        await asyncio.sleep(self.seconds)
        if int_id in self.busy:
            return False
        self.loaded.pop(int_id, None)
        return True


class Bench:
    def __init__(self, home, host_slots=8, names=(), seconds=0.01, place_seconds=5.0):
        self.store, self.engine, self.kept = Store(home), Engine(seconds), set()
        self.names = dict.fromkeys(names)
        self.registry = Registry(
            self.names,
            self.engine,
            self.store,
            base_model="base",
            host_slots=host_slots,
            wanted=self.kept.__contains__,
            place_seconds=place_seconds,
        )

    def publish(self, number, int_id=None):
        name = f"f2l-{number}"

        def write(directory):
            directory.mkdir()
            (directory / "weights").write_text(name)

        self.store.publish_adapter(name, write, {})
        self.kept.add(name)
        return AdapterRecord(int_id or number, name, 16, 10, {}, 0.0)

    async def remove(self, record):
        """As a deletion does: the catalog first."""
        self.kept.discard(record.name)
        await self.registry.remove(record)

    def exists(self, number):
        return self.store.adapter_path(f"f2l-{number}").exists()


def ids(bench):
    return {request.lora_name: request.lora_int_id - FIRST_ADAPTER_ID for request in bench.names.values() if request}


async def pause():
    """Long enough for what must not happen."""
    await asyncio.sleep(0.15)


def test_an_adapter_is_loaded_once_before_it_is_named(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        record = bench.publish(1)
        leases = await asyncio.gather(*(bench.registry.acquire(record) for _ in range(20)))
        assert bench.engine.calls == [("add", "f2l-1", FIRST_ADAPTER_ID + 1)]
        assert ids(bench) == {"f2l-1": 1}
        assert {lease.key for lease in leases} == set(bench.names)
        for lease in leases:
            lease.release()
            lease.release()
        await settle()
        assert ids(bench) == {"f2l-1": 1}  # resident, unused

    asyncio.run(scenario())


def test_nobody_else_can_name_an_adapter(tmp_path):
    async def scenario():
        bench, other = Bench(tmp_path / "a"), Bench(tmp_path / "b")
        lease = await bench.registry.acquire(bench.publish(1))
        twin = await other.registry.acquire(other.publish(1))
        assert lease.adapter.name == twin.adapter.name
        assert lease.key != twin.key
        assert lease.adapter.name not in bench.names

    asyncio.run(scenario())


def test_removal_waits_for_the_last_lease(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        record = bench.publish(1)
        first, second = await bench.registry.acquire(record), await bench.registry.acquire(record)
        await bench.remove(record)
        first.release()
        await pause()
        assert ids(bench) == {"f2l-1": 1}
        assert bench.exists(1)
        second.release()
        await settle()
        assert bench.names == {}
        assert bench.engine.loaded == {}
        assert not bench.exists(1)

    asyncio.run(scenario())


def test_files_go_only_when_the_engine_has_let_go(tmp_path):
    """A client that vanished leaves a question in the engine for a moment, after its lease."""

    async def scenario():
        bench = Bench(tmp_path)
        record = bench.publish(1)
        lease = await bench.registry.acquire(record)
        bench.engine.busy.add(FIRST_ADAPTER_ID + 1)
        lease.release()
        await asyncio.sleep(0)
        removal = asyncio.create_task(bench.remove(record))
        await pause()
        assert bench.names == {}  # no new question can reach it
        assert bench.exists(1)
        bench.engine.busy.clear()
        await removal
        assert bench.engine.loaded == {}
        assert not bench.exists(1)

    asyncio.run(scenario())


def test_a_name_published_again_while_in_use_keeps_the_id_the_engine_knows(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        old = await bench.registry.acquire(bench.publish(1, int_id=1))
        await bench.remove(AdapterRecord(1, "f2l-1", 16, 10, {}, 0.0))
        again = bench.publish(1, int_id=2)
        new = await bench.registry.acquire(again)
        assert {call[-1] for call in bench.engine.calls} == {FIRST_ADAPTER_ID + 1}
        old.release()
        await pause()
        assert ids(bench) == {"f2l-1": 1}
        new.release()
        await pause()
        assert bench.exists(1)
        (await bench.registry.acquire(again)).release()
        assert ids(bench) == {"f2l-1": 2}  # the old id has left first: the engine here accepts no name twice

    asyncio.run(scenario())


def test_files_that_are_wanted_again_are_not_removed(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        record = bench.publish(1)
        await bench.registry.remove(record)
        assert bench.exists(1)

    asyncio.run(scenario())


@pytest.mark.parametrize("damage", ["file", "engine"])
def test_an_adapter_that_cannot_be_loaded_leaves_nothing(tmp_path, damage):
    async def scenario():
        bench = Bench(tmp_path, host_slots=1)
        record = bench.publish(1)
        if damage == "file":
            (bench.store.adapter_path("f2l-1") / "weights").write_text("other")
        else:
            bench.engine.refuse = 2
        results = await asyncio.gather(*(bench.registry.acquire(record) for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [AdapterLost if damage == "file" else APIError] * 3
        if damage == "engine":
            assert {(result.status, result.code) for result in results} == {(503, "adapter_unavailable")}
            assert int(results[0].headers["Retry-After"]) > 0
        await settle()
        assert bench.names == {}
        bench.engine.calls.clear()
        (await bench.registry.acquire(bench.publish(2 if damage == "file" else 1))).release()
        assert len(bench.engine.calls) == 1  # neither the refused load nor its place is remembered

    asyncio.run(scenario())


def test_a_deleted_adapter_whose_load_fails_loses_its_files(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        record = bench.publish(1)
        bench.engine.refuse = 2
        question = asyncio.create_task(bench.registry.acquire(record))
        while not bench.engine.calls:
            await asyncio.sleep(0.001)
        await bench.remove(record)
        with pytest.raises(APIError, match="could not be loaded"):
            await question
        await settle()
        assert not bench.exists(1)

    asyncio.run(scenario())


def test_a_load_that_fails_once_is_tried_again(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        bench.engine.refuse = 1
        (await bench.registry.acquire(bench.publish(1))).release()
        assert len(bench.engine.calls) == 2

    asyncio.run(scenario())


def test_files_damaged_between_their_check_and_their_load_are_lost_not_unavailable(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        record = bench.publish(1)
        bench.engine.refuse = 2
        question = asyncio.create_task(bench.registry.acquire(record))
        while not bench.engine.calls:
            await asyncio.sleep(0.001)
        (bench.store.adapter_path("f2l-1") / "weights").write_text("f2l-2")
        with pytest.raises(AdapterLost):
            await question
        assert bench.names == {}

    asyncio.run(scenario())


def test_a_dead_engine_is_no_fault_of_the_adapter(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)

        async def dead(_request):
            raise EngineDeadError

        bench.engine.add_lora = dead
        with pytest.raises(EngineDeadError):
            await bench.registry.acquire(bench.publish(1))
        assert (bench.names, bench.registry._free) == ({}, 8)

    asyncio.run(scenario())


def test_an_adapter_that_the_engine_has_dropped_is_loaded_for_the_next_question(tmp_path):
    async def scenario():
        bench = Bench(tmp_path, host_slots=1)
        record = bench.publish(1)
        first, second = await bench.registry.acquire(record), await bench.registry.acquire(record)
        assert await first.confirm()
        bench.engine.loaded.clear()
        assert not await first.confirm()
        assert not await second.confirm()
        assert bench.names == {}
        again = await bench.registry.acquire(record)
        first.release()
        second.release()
        await settle()
        assert set(ids(bench)) == {"f2l-1"}  # held by the third, whatever the others do
        assert await again.confirm()
        again.release()
        await settle()
        assert bench.registry._free == 0
        (await bench.registry.acquire(bench.publish(2))).release()
        assert set(ids(bench)) == {"f2l-2"}  # its place is counted once

    asyncio.run(scenario())


def test_the_least_recently_used_idle_adapter_makes_room(tmp_path):
    async def scenario():
        bench = Bench(tmp_path, host_slots=3, names=["the operator's"])  # which takes one of the three places
        held = await bench.registry.acquire(bench.publish(1))
        for number in (2, 3):
            (await bench.registry.acquire(bench.publish(number))).release()
            await settle()
        assert set(ids(bench)) == {"f2l-1", "f2l-3"}
        held.release()
        await settle()
        (await bench.registry.acquire(bench.publish(2))).release()
        assert set(ids(bench)) == {"f2l-1", "f2l-2"}
        assert bench.engine.most == 2
        assert "the operator's" in bench.names

    asyncio.run(scenario())


def test_only_questions_whose_adapter_is_not_in_memory_count_as_loads(tmp_path):
    async def scenario():
        bench = Bench(tmp_path, host_slots=2)
        one, two, three = (bench.publish(number) for number in (1, 2, 3))
        before = metrics.LOADED._value.get()
        for record, loads in ((one, 1), (one, 1), (two, 2), (one, 2), (three, 3), (one, 3), (two, 4)):
            (await bench.registry.acquire(record)).release()
            await settle()
            assert metrics.LOADED._value.get() - before == loads
        bench.registry.take_used()
        (await bench.registry.acquire(three, asked=False)).release()
        assert (metrics.LOADED._value.get() - before, bench.registry.take_used()) == (4, {})
        assert set(ids(bench)) == {"f2l-2", "f2l-3"}

    asyncio.run(scenario())


def test_an_adapter_in_use_is_never_dropped_for_another(tmp_path):
    async def scenario():
        bench = Bench(tmp_path, host_slots=2, place_seconds=0.3)
        held = [await bench.registry.acquire(bench.publish(number)) for number in (1, 2)]
        with pytest.raises(APIError) as error:
            await bench.registry.acquire(bench.publish(3))
        assert (error.value.status, error.value.code) == (503, "too_many_videos_in_use")
        assert int(error.value.headers["Retry-After"]) > 0
        assert set(ids(bench)) == {"f2l-1", "f2l-2"}
        waiting = asyncio.create_task(bench.registry.acquire(bench.publish(3)))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        held[1].release()
        (await waiting).release()
        assert set(ids(bench)) == {"f2l-1", "f2l-3"}

    asyncio.run(scenario())


def test_a_client_that_goes_away_leaves_the_load_to_the_others(tmp_path):
    async def scenario():
        bench = Bench(tmp_path, host_slots=1)
        record = bench.publish(1)
        first, second = (asyncio.create_task(bench.registry.acquire(record)) for _ in range(2))
        while not bench.engine.calls:
            await asyncio.sleep(0.001)
        first.cancel()
        (await second).release()
        assert len(bench.engine.calls) == 1
        await settle()
        alone = asyncio.create_task(bench.registry.acquire(bench.publish(2)))
        while ("add", "f2l-2", FIRST_ADAPTER_ID + 2) not in bench.engine.calls:
            await asyncio.sleep(0.001)
        alone.cancel()
        await settle()
        assert bench.engine.loaded == {FIRST_ADAPTER_ID + 2: "f2l-2"}
        (await bench.registry.acquire(bench.publish(3))).release()  # its place is not lost
        assert bench.engine.loaded == {FIRST_ADAPTER_ID + 3: "f2l-3"}

    asyncio.run(scenario())


def test_an_operators_adapters_must_leave_places(tmp_path):
    async def scenario():
        with pytest.raises(ValueError, match="--max-cpu-loras"):
            Bench(tmp_path, host_slots=2, names=["a", "b"])

    asyncio.run(scenario())


def test_nothing_is_left_after_thousands_of_lives(tmp_path):
    """Questions, clients that go away, deletions and the same video again, all at once, over too few places."""
    dice = random.Random(0)

    async def scenario():
        bench = Bench(tmp_path, host_slots=6, seconds=0.0)
        records = {number: bench.publish(number) for number in range(20)}
        answered = 0

        async def question(number):
            nonlocal answered
            try:
                lease = await bench.registry.acquire(records[number])
            except AdapterLost:  # deleted a moment ago
                records[number] = bench.publish(number)
                return
            try:
                assert bench.names[lease.key].lora_name == f"f2l-{number}"
                await asyncio.sleep(0)
                assert bench.engine.loaded[bench.names[lease.key].lora_int_id] == f"f2l-{number}"
                answered += 1
            finally:
                lease.release()

        for cycle in range(250):
            tasks = [asyncio.create_task(question(dice.randrange(20))) for _ in range(12)]
            removals = [asyncio.create_task(bench.remove(records[dice.randrange(20)])) for _ in range(2)]
            await asyncio.sleep(0)
            dice.choice(tasks).cancel()
            results = await asyncio.gather(*tasks, *removals, return_exceptions=True)
            assert not [r for r in results if isinstance(r, Exception)], cycle
        assert answered > 1500
        for record in records.values():
            await bench.remove(record)
        await settle()
        registry = bench.registry
        left = (bench.names, registry._entries, registry._idle, registry._leaving, registry._tasks, bench.engine.loaded)
        assert not any(left)
        assert (registry._free, len(registry._waiting)) == (6, 0)
        assert not list((tmp_path / "adapters").iterdir())
        assert bench.engine.most <= 6
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())
