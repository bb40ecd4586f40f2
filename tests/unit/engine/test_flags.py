"""The flags that are checked before vLLM is loaded are those of vLLM 0.32."""

import json

from f2l_vllm.engine.flags import TABLE
from f2l_vllm.engine.flags_table import describe


def test_the_table_of_flags_is_that_of_vllm_0_32():
    assert json.loads(TABLE.read_text()) == json.loads(json.dumps(describe()))
