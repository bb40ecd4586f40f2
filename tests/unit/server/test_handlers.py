import asyncio

from vllm.v1.engine.exceptions import EngineDeadError

from f2l_vllm.server.chat.handlers import AnswerStream
from f2l_vllm.server.chat.resolve import AnswerSource

FAILED = 'data: {"error":{"message":"the engine is dead","code":500}}\n\n'


class LeaseOfADeadEngine:
    released = False

    async def confirm(self):
        raise EngineDeadError

    def release(self):
        self.released = True


def test_a_stream_whose_engine_died_ends_with_vllms_error():
    async def chunks():
        yield 'data: {"choices":[{"delta":{"content":"A"}}]}\n\n'
        yield FAILED
        yield "data: [DONE]\n\n"

    async def answer():
        return [chunk async for chunk in AnswerStream(chunks(), AnswerSource("adapter", lease=lease))]

    lease = LeaseOfADeadEngine()
    assert asyncio.run(answer())[1:] == [FAILED, "data: [DONE]\n\n"]
    assert lease.released
