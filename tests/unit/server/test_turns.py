import asyncio

from f2l_vllm.server.media.turns import Turns


def test_tenants_take_turns_however_many_one_of_them_sends():
    async def run():
        turns, served = Turns(1), []

        async def work(tenant):
            await turns.take(tenant)
            served.append(tenant)
            await asyncio.sleep(0)
            turns.give_back()

        await turns.take("first")
        tasks = [asyncio.create_task(work(tenant)) for tenant in "aaaaabc"]
        await asyncio.sleep(0)
        turns.give_back()
        await asyncio.gather(*tasks)
        return "".join(served)

    assert asyncio.run(run()) == "abcaaaa"


def test_who_leaves_takes_no_place_along():
    async def run():
        turns = Turns(1)
        await turns.take("a")
        waiting = [asyncio.create_task(turns.take("b")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # while it waits
        await asyncio.sleep(0)
        turns.give_back()
        waiting[1].cancel()  # when its place has just come
        await asyncio.gather(*waiting[:2], return_exceptions=True)
        await asyncio.wait_for(waiting[2], 1)
        turns.give_back()
        await asyncio.wait_for(turns.take("c"), 1)

    asyncio.run(run())
