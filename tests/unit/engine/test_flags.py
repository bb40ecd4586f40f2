"""The flags that are checked before vLLM is loaded are those of the installed vLLM."""

import json

from f2l_vllm.engine.flags import read, table
from f2l_vllm.engine.flags_table import describe


def test_the_table_of_flags_is_that_of_the_installed_vllm():
    assert json.loads(table().read_text()) == json.loads(json.dumps(describe()))


def test_every_name_that_turns_a_switch_off_does():
    switches = {name: flag["dest"] for flag in json.loads(table().read_text()) for name in flag.get("off", ())}
    assert len(switches) > 50
    assert switches["--no-enable-lora"] == "enable_lora"
    for name, dest in switches.items():
        assert vars(read([name])) == {dest: False}
