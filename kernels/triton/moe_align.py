"""Choices of experts in the order of the experts, each expert's filled up to whole blocks of rows.

order         the number of a choice (token * topk + k), or the number of choices where a block has no more
block_expert  the expert of each block of `order`, -1 for blocks that nothing needs

Sizes follow from the number of choices alone, so that nothing here asks the device how the choices fell.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# choices that one program compares pair by pair; more do not fit into its registers
FEW = 64


def most_blocks(choices: int, num_experts: int, block_m: int) -> int:
    """Blocks of `block_m` rows that any choices may need: each expert that was chosen leaves part of one empty."""
    return (choices + min(choices, num_experts) * (block_m - 1)) // block_m


@triton.jit(do_not_specialize=["choices", "num_blocks"])
def few_kernel(
    ids, order, block_expert, choices, num_experts, num_blocks,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Everything in one program, which compares each choice with each."""
    i = tl.arange(0, BLOCK)
    expert = tl.load(ids + i, mask=i < choices, other=-1)
    real = (expert >= 0) & (expert < num_experts)
    same = expert[:, None] == expert[None, :]
    rank = tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1)
    count = tl.sum(same.to(tl.int32), 1)
    leads = real & (rank == 0)
    blocks = tl.where(leads, tl.cdiv(count, BLOCK_M), 0)
    first = tl.sum(tl.where(expert[None, :] < expert[:, None], blocks[None, :], 0), 1)
    tl.store(order + first * BLOCK_M + rank, i, mask=real)
    row = count[:, None] + tl.arange(0, BLOCK_M)[None, :]
    tl.store(order + first[:, None] * BLOCK_M + row, choices, mask=row < blocks[:, None] * BLOCK_M)
    block = tl.arange(0, BLOCKS)
    own = block[None, :] < blocks[:, None]
    tl.store(block_expert + first[:, None] + block[None, :], expert[:, None].to(tl.int32), mask=own)
    tl.store(block_expert + block, -1, mask=(block >= tl.sum(blocks, 0)) & (block < num_blocks))


@triton.jit(do_not_specialize=["choices"])
def count_kernel(ids, counts, choices, BLOCK: tl.constexpr):
    """counts[e] = number of ids that are e; one program an expert."""
    expert = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, choices, BLOCK):
        choice = start + tl.arange(0, BLOCK)
        found += (tl.load(ids + choice, mask=choice < choices, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, 0))


@triton.jit(do_not_specialize=["choices", "num_blocks"])
def place_kernel(
    ids, counts, order, block_expert,
    choices, num_experts, num_blocks,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Writes one expert's part of `order` and `block_expert`; the program after the last marks what is unused."""
    expert = tl.program_id(0)
    each = tl.arange(0, BLOCK_E)
    blocks = tl.cdiv(tl.load(counts + each, mask=each < num_experts, other=0), BLOCK_M)
    first = tl.sum(tl.where(each < expert, blocks, 0), 0)
    end = first + tl.sum(tl.where(each == expert, blocks, 0), 0)
    owner = expert
    if expert == num_experts:
        end = num_blocks
        owner = -1
    for start in range(first, end, BLOCK):
        block = start + tl.arange(0, BLOCK)
        tl.store(block_expert + block, owner, mask=block < end)
    if expert < num_experts:
        row = first * BLOCK_M
        for start in range(0, choices, BLOCK):
            choice = start + tl.arange(0, BLOCK)
            hit = (tl.load(ids + choice, mask=choice < choices, other=-1) == expert).to(tl.int32)
            tl.store(order + row + tl.cumsum(hit, 0) - 1, choice, mask=hit > 0)
            row += tl.sum(hit, 0)
        unused = row + tl.arange(0, BLOCK_M)
        tl.store(order + unused, choices, mask=unused < end * BLOCK_M)


def align(ids: torch.Tensor, num_experts: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, block_expert), both int32, for ids of any shape; ids that are no expert's are left out.

    order (blocks * block_m,): every block belongs to one expert, choices in ascending order within an expert. Blocks
        that nothing needs come last and hold undefined values.
    block_expert (blocks,): blocks = most_blocks(ids.numel(), num_experts, block_m).
    """
    ids = ids.reshape(-1)
    choices = ids.numel()
    num_blocks = most_blocks(choices, num_experts, block_m)
    order = torch.empty(num_blocks * block_m, dtype=torch.int32, device=ids.device)
    block_expert = torch.empty(num_blocks, dtype=torch.int32, device=ids.device)
    block = min(1024, max(16, triton.next_power_of_2(choices)))
    if choices <= FEW:
        few_kernel[(1,)](
            ids, order, block_expert, choices, num_experts, num_blocks,
            BLOCK=block, BLOCK_M=block_m, BLOCKS=triton.next_power_of_2(num_blocks),
            num_warps=8 if block > 32 else 4,
        )  # fmt: skip
        return order, block_expert
    counts = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    count_kernel[(num_experts,)](ids, counts, choices, BLOCK=block)
    place_kernel[(num_experts + 1,)](
        ids, counts, order, block_expert, choices, num_experts, num_blocks,
        BLOCK=block, BLOCK_M=block_m, BLOCK_E=max(16, triton.next_power_of_2(num_experts)),
    )  # fmt: skip
    return order, block_expert
