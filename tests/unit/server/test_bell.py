"""The alarm that notices ring."""

import asyncio

import pytest

from f2l_vllm.server.videos.bell import Bell


@pytest.mark.parametrize("turns", range(4))
def test_who_is_cancelled_while_it_rings_is_cancelled(turns):
    async def scenario():
        bell = Bell(None, "files")
        waiting = asyncio.create_task(bell.wait(5.0))
        await asyncio.sleep(0.01)
        bell.ring()
        for _ in range(turns):
            await asyncio.sleep(0)
        if waiting.cancel():  # else it had ended before
            with pytest.raises(asyncio.CancelledError):
                await waiting
        else:
            assert waiting.result()

    asyncio.run(scenario())


def test_a_wait_ends_without_a_ring():
    assert not asyncio.run(Bell(None, "files").wait(0.01))
