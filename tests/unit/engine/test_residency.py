"""Which adapters an engine keeps, over workers that only record."""

from argparse import Namespace

import pytest
from vllm.lora.request import LoRARequest

from f2l_vllm.engine.residency import FIRST_ADAPTER_ID, Residency


class Workers:
    def __init__(self):
        self.loaded, self.broken, self.calls = set(), set(), []

    def add_lora(self, request):
        self.calls.append(("add", request.lora_int_id))
        self.loaded.add(request.lora_int_id)  # one of several workers may have loaded it before another fails
        if request.lora_name in self.broken:
            raise RuntimeError(f"{request.lora_name} is damaged")
        return True

    def remove_lora(self, adapter_id):
        self.calls.append(("remove", adapter_id))
        self.loaded.discard(adapter_id)
        return True

    def pin_lora(self, adapter_id):
        return adapter_id in self.loaded

    def list_loras(self):
        return set(self.loaded)


class Bench:
    def __init__(self, capacity=2):
        self.workers, self.requests = Workers(), {}
        self.residency = Residency(self.workers, self.requests, capacity)

    def ask(self, number, name=None):
        """A request enters the scheduler."""
        lora = adapter(number, name)
        self.residency.admit(lora)
        key = f"request-{len(self.requests)}"
        self.requests[key] = Namespace(lora_request=lora, is_finished=lambda: False)
        return key

    def end(self, key):
        self.requests[key].is_finished = lambda: True


def adapter(number, name=None):
    return LoRARequest(name or f"adapter-{number}", number, f"/adapters/{number}")


def test_a_request_finds_its_adapter_loaded():
    bench = Bench()
    bench.ask(1)
    assert bench.workers.loaded == {1}


def test_an_adapter_that_cannot_be_loaded_is_refused_and_leaves_nothing():
    bench = Bench()
    bench.workers.broken.add("adapter-1")
    with pytest.raises(RuntimeError, match="damaged"):
        bench.ask(1)
    assert bench.workers.loaded == set()
    bench.workers.broken.clear()
    bench.ask(1)
    assert bench.workers.loaded == {1}


def test_the_operators_idle_adapters_leave_least_recently_asked_for_first():
    bench = Bench()
    for number in (1, 2, 1):
        bench.end(bench.ask(number))
    bench.ask(3)
    assert bench.workers.loaded == {1, 3}


def test_an_adapter_that_a_request_uses_stays_whatever_the_capacity():
    bench = Bench()
    keys = [bench.ask(number) for number in (1, 2, 3)]
    assert bench.workers.loaded == {1, 2, 3}
    assert bench.residency.remove(2) is False
    assert bench.workers.loaded == {1, 2, 3}
    for key in keys:
        bench.end(key)
    assert bench.residency.remove(2) is True
    bench.ask(4)
    assert len(bench.workers.loaded) == 2


def test_ours_stay_until_they_are_removed():
    bench = Bench()
    ours = FIRST_ADAPTER_ID + 1
    bench.residency.add(adapter(ours))
    for number in (1, 2, 3):
        bench.end(bench.ask(number))
    assert bench.workers.loaded == {ours, 3}
    assert bench.residency.remove(ours) is True
    assert bench.workers.loaded == {3}


def test_pinned_adapters_stay():
    bench = Bench()
    bench.residency.add(adapter(1))
    assert bench.residency.pin(1)
    for number in (2, 3):
        bench.end(bench.ask(number))
    assert bench.workers.loaded == {1, 3}


@pytest.mark.parametrize(("number", "name"), [(2, "first"), (1, "second")])
def test_names_and_ids_in_the_engine_are_one_to_one(number, name):
    bench = Bench(capacity=8)
    key = bench.ask(1, "first")
    with pytest.raises(ValueError, match="has the name or the id of another one in use"):
        bench.ask(number, name)
    assert bench.workers.loaded == {1}
    bench.end(key)
    bench.workers.calls.clear()
    bench.ask(number, name)
    assert bench.workers.calls == [("remove", 1), ("add", number)]


def test_workers_that_lost_adapters_are_asked_what_they_hold():
    bench = Bench()
    bench.residency.add(adapter(1))
    bench.workers.loaded.clear()  # new base weights
    bench.residency.doubt()
    bench.ask(1)
    assert bench.workers.loaded == {1}


def test_nothing_is_kept_of_adapters_that_left():
    bench = Bench(capacity=4)
    for number in range(1, 2000):
        bench.end(bench.ask(FIRST_ADAPTER_ID + number))
        bench.requests.clear()
        bench.residency.pin(FIRST_ADAPTER_ID + number)
        bench.residency.remove(FIRST_ADAPTER_ID + number)
    assert bench.workers.loaded == set()
    assert not bench.residency._names
    assert not bench.residency._pinned
