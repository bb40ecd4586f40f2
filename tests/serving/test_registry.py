"""The registry's rules, over a real store and an engine that only records."""

import asyncio

import pytest

from f2l_vllm.adapters.store import Store
from f2l_vllm.adapters.tables import AdapterRecord
from f2l_vllm.serving.compat import FIRST_ADAPTER_ID
from f2l_vllm.serving.registry import AdapterLost, Registry


class Engine:
    def __init__(self):
        self.loaded, self.calls, self.refuse = set(), [], False

    async def add_lora(self, request):
        self.calls.append(("add", request.lora_name, request.lora_int_id))
        await asyncio.sleep(0.01)
        if self.refuse:
            raise RuntimeError("no room")
        self.loaded.add(request.lora_int_id)
        return True

    async def remove_lora(self, int_id):
        self.calls.append(("remove", int_id))
        self.loaded.discard(int_id)
        return True


class Bench:
    def __init__(self, home, host_slots=8):
        self.store, self.engine, self.names, self.kept = Store(home), Engine(), {}, set()
        self.registry = Registry(
            self.names, self.engine, self.store, base_model="base", host_slots=host_slots, wanted=self.kept.__contains__
        )

    def publish(self, number, int_id=None):
        name = f"f2l-{number}"

        def write(directory):
            directory.mkdir()
            (directory / "weights").write_text(name)

        self.store.publish_adapter(name, write, {})
        return AdapterRecord(int_id or number, name, 16, 10, {}, 0.0)


def ids(bench):
    return {request.lora_name: request.lora_int_id - FIRST_ADAPTER_ID for request in bench.names.values()}


async def settle():
    await asyncio.sleep(0.1)


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
        await bench.registry.remove(record)
        first.release()
        await settle()
        assert ids(bench) == {"f2l-1": 1}
        assert bench.store.adapter_path("f2l-1").exists()
        second.release()
        await settle()
        assert bench.names == {}
        assert bench.engine.loaded == set()
        assert not bench.store.adapter_path("f2l-1").exists()

    asyncio.run(scenario())


def test_a_name_published_again_while_in_use_keeps_the_id_the_engine_knows(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        old = await bench.registry.acquire(bench.publish(1, int_id=1))
        await bench.registry.remove(AdapterRecord(1, "f2l-1", 16, 10, {}, 0.0))
        bench.kept.add("f2l-1")
        new = await bench.registry.acquire(bench.publish(1, int_id=2))
        assert {call[-1] for call in bench.engine.calls} == {FIRST_ADAPTER_ID + 1}
        old.release()
        new.release()
        await settle()
        assert ids(bench) == {"f2l-1": 1}
        assert bench.store.adapter_path("f2l-1").exists()

    asyncio.run(scenario())


def test_files_that_are_wanted_again_are_not_removed(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        record = bench.publish(1)
        bench.kept.add("f2l-1")
        await bench.registry.remove(record)
        assert bench.store.adapter_path("f2l-1").exists()

    asyncio.run(scenario())


@pytest.mark.parametrize("damage", ["file", "engine"])
def test_an_adapter_that_cannot_be_loaded_leaves_nothing(tmp_path, damage):
    async def scenario():
        bench = Bench(tmp_path)
        record = bench.publish(1)
        if damage == "file":
            (bench.store.adapter_path("f2l-1") / "weights").write_text("other")
        else:
            bench.engine.refuse = True
        with pytest.raises(AdapterLost if damage == "file" else RuntimeError, match=r"differs|no room"):
            await bench.registry.acquire(record)
        await settle()
        assert bench.names == {}
        bench.engine.calls.clear()
        bench.engine.refuse = False
        if damage == "engine":
            (await bench.registry.acquire(record)).release()
            assert len(bench.engine.calls) == 1  # nothing of the refused load is remembered

    asyncio.run(scenario())


def test_names_beyond_the_engines_host_slots_are_forgotten_oldest_first(tmp_path):
    async def scenario():
        bench = Bench(tmp_path, host_slots=2)
        held = await bench.registry.acquire(bench.publish(1))
        for number in (2, 3):
            (await bench.registry.acquire(bench.publish(number))).release()
            await settle()
        assert set(ids(bench)) == {"f2l-1", "f2l-3"}
        held.release()
        await settle()
        (await bench.registry.acquire(bench.publish(2))).release()
        assert [call[1] for call in bench.engine.calls] == ["f2l-1", "f2l-2", "f2l-3", "f2l-2"]

    asyncio.run(scenario())
