"""A server's work on batches, over a real catalog and store, with an app that answers as the test says."""

import asyncio
import contextlib
import json
from collections import Counter

import pytest
from sqlalchemy import update
from starlette.responses import JSONResponse

from f2l_vllm.catalog import batch_tables
from f2l_vllm.catalog.batch_tables import BatchState
from f2l_vllm.catalog.batches import duty
from f2l_vllm.server.batches import runner
from f2l_vllm.server.batches.runner import Batches
from f2l_vllm.server.middleware.auth import AuthMiddleware
from f2l_vllm.server.tenants import Keys
from tests.unit.server.test_service import Bench, T

CHAT = "/v1/chat/completions"
ERROR = {"error": {"message": "", "type": "", "param": None, "code": "video_not_ready"}}


class App:
    """Answers each question with its number; `says` has other answers, by how often they are given."""

    def __init__(self):
        self.asked, self.left, self.says = Counter(), [], {}
        self.gate, self.at_once, self.most = asyncio.Event(), 0, 0
        self.gate.set()

    async def __call__(self, scope, receive, send):
        question = json.loads((await receive())["body"])["model"]
        self.asked[question] += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        waiting = [asyncio.ensure_future(self.gate.wait()), asyncio.ensure_future(receive())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not self.gate.is_set():
                self.left.append(question)
                return
            status, body, headers = next(self.says.get(question, iter(())), (200, {"answer": question}, {}))
            await JSONResponse(body, status, headers)(scope, receive, send)
        finally:
            self.at_once -= 1
            for task in waiting:
                task.cancel()


class Runner:
    """A server of the bench's catalog, with its own app."""

    def __init__(self, bench, name="one", load=lambda: 0, limit=4):
        self.bench, self.app = bench, App()
        bench.service.forgetting.name = name
        settings = bench.service.settings.model_copy(update={"batch_requests": limit})
        bench.service.settings = settings
        self.batches = Batches(bench.service, self.app, load)

    async def until(self, done, seconds=20):
        """Work until `done()`."""
        bench = self.bench.service
        bench.membership.appointed.set()
        run = asyncio.create_task(self.batches.run())
        try:
            async with asyncio.timeout(seconds):
                while not done():
                    await asyncio.sleep(0.01)
        finally:
            run.cancel()
            await asyncio.wait([run])
            while self.batches._works:
                await asyncio.sleep(0.01)

    async def finish(self, *given):
        catalog = self.bench.catalog
        await self.until(lambda: all(catalog.batch(one.id, one.tenant).has_ended for one in given))
        return [catalog.batch(one.id, one.tenant) for one in given]


@pytest.fixture
def on_bench(tmp_path, monkeypatch):
    """Runs a test with a bench, on an event loop."""
    monkeypatch.setattr(runner, "_TICK_SECONDS", 0.05)

    async def run(test):
        await test(Bench(tmp_path))

    return lambda test: asyncio.run(run(test))


async def begin(bench, count, tenant=T, seconds=60.0, prefix=""):
    lines = [
        {"custom_id": str(n), "method": "POST", "url": CHAT, "body": {"model": f"{prefix}{n}"}} for n in range(count)
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    file = await bench.upload(text, purpose="batch", tenant=tenant)
    return bench.catalog.add_batch(tenant, CHAT, file.id, seconds=seconds, limit=9, details={"metadata": None})


def lines(bench, batch, kind="output"):
    file_id = batch.details[f"{kind}_file_id"]
    if file_id is None:
        return []
    text = bench.service.fetch_video(bench.catalog.file(file_id, batch.tenant)).read_text()
    return [json.loads(line) for line in text.splitlines()]


def ids(found):
    return [one["custom_id"] for one in found]


def test_every_line_is_answered_in_its_order_and_busy_answers_are_asked_again(on_bench):
    async def run(bench):
        one, batch = Runner(bench), await begin(bench, 9)
        soon = {"Retry-After": "0"}
        one.app.says = {
            "2": iter([(409, ERROR, soon)] * 30),  # longer than others are borne
            "7": iter([(507, {"error": {"code": "store_unavailable"}}, soon)] * 30),
            "3": iter([(503, {"error": {"code": "engine_busy"}}, soon)] * 3),
            "4": iter([(429, {"error": {"code": "queue_full"}}, soon)] * 99),
            "5": iter([(400, {"error": {"code": "invalid_request"}}, {})]),
        }
        (batch,) = await one.finish(batch)
        assert batch.state is BatchState.COMPLETED
        assert (batch.total, batch.completed, batch.failed) == (9, 7, 2)
        assert ids(lines(bench, batch)) == ["0", "1", "2", "3", "6", "7", "8"]
        assert [(one["custom_id"], one["response"]["status_code"]) for one in lines(bench, batch, "error")] == [
            ("4", 429),
            ("5", 400),
        ]
        assert (one.app.asked["2"], one.app.asked["3"], one.app.asked["5"], one.app.asked["6"]) == (31, 4, 1, 1)
        assert one.app.most <= 4
        assert bench.catalog.stored_bytes(T) > 0

    on_bench(run)


def test_a_server_that_stops_or_is_killed_leaves_the_rest_to_the_next(on_bench):
    async def run(bench):
        one, batch = Runner(bench), await begin(bench, 9)
        one.app.says = {str(n): iter([(503, {"error": {"code": "shutting_down"}}, {})]) for n in range(5, 9)}
        await one.until(lambda: bench.catalog.batch(batch.id, T).completed == 5 and one.app.asked.total() == 9)
        one.app.gate.clear()  # and then it is killed with questions open
        await one.until(lambda: one.app.at_once == 4)
        assert sorted(one.app.left) == ["5", "6", "7", "8"]  # the engine is told
        assert bench.catalog.batch(batch.id, T).completed == 5
        next_one = Runner(bench)
        (ended,) = await next_one.finish(batch)
        assert sum(next_one.app.asked.values()) == 4
        assert ids(lines(bench, ended)) == [str(n) for n in range(9)]

    on_bench(run)


def test_two_servers_that_both_take_a_batch_for_their_own_make_the_same_files(on_bench, monkeypatch):
    async def run(bench):
        one, two, batch = Runner(bench), Runner(bench), await begin(bench, 30)
        monkeypatch.setattr(bench.catalog, "hold_duty", lambda _duty, _name: True)
        (ended,), _ = await asyncio.gather(one.finish(batch), two.finish(batch))
        assert one.app.asked.total() > 0
        assert two.app.asked.total() > 0
        assert ended.completed == 30
        assert ids(lines(bench, ended)) == [str(n) for n in range(30)]
        again = await begin(bench, 1)
        bench.catalog.move_batch(again, BatchState.IN_PROGRESS, total=1)
        bench.catalog.add_answer(again, 1, "x\n", is_success=True)
        again = bench.catalog.move_batch(again, BatchState.FINALIZING, outcome="completed")
        await asyncio.gather(one.batches._end(again), two.batches._end(again))
        again = bench.catalog.batch(again.id, T)
        outputs, _ = bench.catalog.files(T, after=None, limit=9, descending=False, purpose="batch_output")
        assert [file.id for file in outputs] == [one.details["output_file_id"] for one in (ended, again)]

    on_bench(run)


def test_a_batch_that_another_server_holds_is_left_alone(on_bench):
    async def run(bench):
        one, batch = Runner(bench), await begin(bench, 2)
        assert bench.catalog.hold_duty(duty(batch), "another")
        with contextlib.suppress(TimeoutError):
            await one.until(lambda: one.app.asked.total(), 0.5)
        assert bench.catalog.batch(batch.id, T).state is BatchState.VALIDATING
        bench.catalog.leave_duties("another")
        await one.finish(batch)

    on_bench(run)


def test_one_that_loses_its_duty_stops_asking(on_bench):
    async def run(bench):
        one, batch = Runner(bench), await begin(bench, 2)
        one.app.gate.clear()
        bench_hold, held = bench.catalog.hold_duty, True
        bench.catalog.hold_duty = lambda name, server: held and bench_hold(name, server)

        def lost():
            nonlocal held
            held = one.app.at_once == 0 and held
            return len(one.app.left) == 2

        await one.until(lost)
        assert bench.catalog.batch(batch.id, T).state is BatchState.IN_PROGRESS

    on_bench(run)


def test_a_cancelled_batch_leaves_the_engine_and_keeps_its_answers(on_bench):
    async def run(bench):
        one, batch = Runner(bench), await begin(bench, 20)
        await one.until(lambda: bench.catalog.batch(batch.id, T).completed == 20 or one.app.asked.total() > 3)
        one.app.gate.clear()
        left = asyncio.create_task(one.finish(batch))
        await asyncio.sleep(0.2)
        bench.catalog.move_batch(batch, BatchState.CANCELLING)
        (ended,) = await left
        assert ended.state is BatchState.CANCELLED
        assert len(lines(bench, ended)) == ended.completed < 20
        assert lines(bench, ended, "error") == []

    on_bench(run)


def test_when_the_window_ends_the_errors_name_what_was_not_asked(on_bench):
    async def run(bench):
        one, batch = Runner(bench), await begin(bench, 6)
        one.app.says = {"0": iter([(404, {}, {})]), "4": iter([(409, ERROR, {"Retry-After": "0"})] * 9999)}
        await one.until(lambda: bench.catalog.batch(batch.id, T).completed == 4)
        late = await begin(bench, 2, seconds=-1.0)  # nobody looked at it in time
        with bench.catalog._write() as connection:
            of_batch = update(batch_tables.batches).where(batch_tables.batches.c.id == batch.id)
            connection.execute(of_batch.values(expires_at=bench.catalog.now() - 1))
        ended, other = await one.finish(batch, late)
        assert ended.state is other.state is BatchState.EXPIRED
        assert ids(lines(bench, ended)) == ["1", "2", "3", "5"]
        first, second = lines(bench, ended, "error")
        assert (first["custom_id"], first["response"]["status_code"]) == ("0", 404)
        assert (second["custom_id"], second["response"], second["error"]["code"]) == ("4", None, "batch_expired")
        assert other.total == 0

    on_bench(run)


def test_a_batch_whose_input_is_deleted_fails_with_what_was_answered(on_bench):
    async def run(bench):
        one, batch = Runner(bench), await begin(bench, 6)
        early = await begin(bench, 3, prefix="never")
        await bench.service.remove(early.input_file, T)
        one.app.says = {"5": iter([(409, ERROR, {"Retry-After": "0"})] * 9999)}
        work = asyncio.create_task(one.finish(batch, early))
        while bench.catalog.batch(batch.id, T).completed < 5:
            await asyncio.sleep(0.01)
        await bench.service.remove(batch.input_file, T)
        ended, other = await work
        assert ended.state is other.state is BatchState.FAILED
        for found in (ended, other):
            assert found.details["errors"]["data"][0]["code"] == "input_file_not_found"
        assert ids(lines(bench, ended)) == ["0", "1", "2", "3", "4"]
        assert not any(question.startswith("never") for question in one.app.asked)

    on_bench(run)


def test_an_input_with_faults_asks_nothing(on_bench):
    async def run(bench):
        one, file = Runner(bench), await bench.upload("{\n[]", purpose="batch")
        batch = bench.catalog.add_batch(T, CHAT, file.id, seconds=9, limit=9, details={"metadata": None})
        (ended,) = await one.finish(batch)
        assert ended.state is BatchState.FAILED
        assert [fault["line"] for fault in ended.details["errors"]["data"]] == [1, 2]
        assert one.app.asked.total() == 0

    on_bench(run)


def test_tenants_take_turns_and_one_has_one_batch_asked_at_a_time(on_bench):
    async def run(bench):
        one = Runner(bench, limit=2)
        given = [await begin(bench, 6, tenant, prefix=f"{n}-") for n, tenant in enumerate((T, T, "other"))]
        one.app.gate.clear()

        def look():
            states = {bench.catalog.batch(batch.id, batch.tenant).state for batch in given}
            if one.app.at_once == 2 and len(one.batches._places._waiters or ()) == 2:  # of both tenants
                one.app.gate.set()
            return states == {BatchState.COMPLETED}

        await one.until(look)
        order = list(one.app.asked)
        assert max(order.index(f"0-{n}") for n in range(6)) < min(order.index(f"1-{n}") for n in range(6))
        assert min(order.index(f"2-{n}") for n in range(6)) < max(order.index(f"0-{n}") for n in range(6))
        assert one.app.most == 2

    on_bench(run)


def test_while_others_ask_a_batch_asks_one_question_at_a_time(on_bench):
    async def run(bench):
        others = 4
        one = Runner(bench, load=lambda: others + one.app.at_once)
        batch = await begin(bench, 12)
        one.app.gate.clear()
        await one.until(lambda: one.app.at_once == 1)
        one.app.gate.set()
        await one.finish(batch)
        assert one.app.most == 1
        others = 0
        one.app.gate.clear()
        await begin(bench, 12, prefix="again")
        await one.until(lambda: one.app.at_once == 4)

    on_bench(run)


def test_a_server_without_places_runs_no_batches(on_bench):
    async def run(bench):
        one, _ = Runner(bench, limit=0), await begin(bench, 1)
        await asyncio.wait_for(one.batches.run(), 5)
        assert one.app.asked.total() == 0

    on_bench(run)


def test_only_the_server_itself_asks_on_behalf_of_a_tenant_and_only_of_one_with_a_key(on_bench, tmp_path):
    path = tmp_path / "tenants.json"
    path.write_text(json.dumps({T: ["key"]}))
    tenants = []

    async def app(scope, receive, send):
        tenants.append(scope["state"]["tenant"])
        await JSONResponse({})(scope, receive, send)

    async def run(bench):
        one, known = Runner(bench), await begin(bench, 1)
        unknown = await begin(bench, 1, "left")
        one.batches._app = AuthMiddleware(app, Keys([], path), [])
        ended, other = await one.finish(known, unknown)
        assert tenants == [T]
        assert len(lines(bench, ended)) == 1
        (refused,) = lines(bench, other, "error")
        assert refused["response"]["body"]["error"]["code"] == "invalid_api_key"

    on_bench(run)
