"""An engine that only records which adapters it has, for tests that are about something else."""

import asyncio


class Engine:
    """`paths` has the folder that each adapter was last loaded from; `names`, what is loaded now, by int id."""

    def __init__(self):
        self.paths, self.names = {}, {}

    async def add_lora(self, request):
        self.paths[request.lora_name] = request.lora_path
        self.names[request.lora_int_id] = request.lora_name
        return True

    async def remove_lora(self, int_id):
        self.names.pop(int_id, None)
        return True


async def settle():
    """Return when whatever goes on in the background is done."""
    await asyncio.sleep(0.01)  # for it to begin
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait_for(asyncio.wait(others), 60)
