"""Stand-ins for compiled operators."""

from __future__ import annotations

import pytest
import torch

from f2l_vllm.cpu import ops


def test_slot_mapping_follows_the_block_table_and_pads_the_rest() -> None:
    block_table = torch.tensor([[7, 3, 0], [5, 1, 9], [2, 0, 0]], dtype=torch.int32)
    # Request 0 continues at position 3, request 1 reads five tokens across two blocks, request 2 starts.
    positions = torch.tensor([3, 2, 3, 4, 5, 6, 0])
    slots = torch.full((9,), 99)
    ops.compute_slot_mapping(torch.tensor([0, 1, 6, 7], dtype=torch.int32), positions, block_table, slots, 4)
    assert slots.tolist() == [7 * 4 + 3, 5 * 4 + 2, 5 * 4 + 3, 4, 5, 6, 2 * 4, ops.PAD_SLOT, ops.PAD_SLOT]


def test_slot_mapping_override_refuses_a_kernel_it_does_not_know() -> None:
    def kernel(tokens, positions_ptr, slots_ptr):
        """A kernel of another version."""

    with pytest.raises(RuntimeError, match="no argument query_start_loc_ptr"):
        ops.SlotMappingOverride(kernel)


def test_greedy_and_sampled_tokens_have_one_per_row() -> None:
    logits = torch.randn(4, 50)
    assert ops.greedy_argmax(logits).tolist() == logits.argmax(-1).tolist()
    assert ops.fused_gumbel_argmax(logits, torch.arange(4)).shape == (4,)


def test_a_draw_depends_on_its_own_seed_only() -> None:
    logits = torch.randn(3, 50)
    together = ops.fused_gumbel_argmax(logits, torch.tensor([5, 6, 7]))
    alone = [ops.fused_gumbel_argmax(logits[row : row + 1], torch.tensor([5 + row])).item() for row in range(3)]
    assert together.tolist() == alone


def test_samples_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = ops.fused_gumbel_argmax(probabilities.log().expand(4000, 4).clone(), torch.arange(4000))
    frequencies = torch.bincount(draws, minlength=4) / 4000
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=0.03)


def test_operators_are_where_vllm_calls_them() -> None:
    ops.install()
    ops.install()
    for name in ("init_cpu_memory_env", "greedy_argmax", "fused_gumbel_argmax", "compute_slot_mapping_kernel_impl"):
        assert hasattr(torch.ops._C, name)
    torch.ops._C.init_cpu_memory_env([0])
