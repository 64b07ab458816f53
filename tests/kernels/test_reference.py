"""The reference kernels against their definitions, spelled out one element or one token at a time."""

from __future__ import annotations

import math
import random

import pytest
import torch

from trine.kernels import ops, reference
from trine.llm.batch import Batch

BLOCK = 4


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and bool((a.double() - b.double()).abs().max() <= tolerance)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_rms_norm() -> None:
    x, weight = torch.randn(3, 5), torch.randn(5)
    rows = [[v / math.sqrt(sum(u * u for u in row) / 5 + 1e-3) for v in row] for row in x.tolist()]
    assert near(reference.rms_norm(x, weight, 1e-3), torch.tensor(rows) * weight)


def test_add_rms_norm_adds_in_place() -> None:
    x, residual, weight = torch.randn(3, 5), torch.randn(3, 5), torch.randn(5)
    total = x + residual
    y = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert near(y, reference.rms_norm(total, weight, 1e-6))


def test_layer_norm() -> None:
    x, weight, bias = torch.randn(3, 5), torch.randn(5), torch.randn(5)
    centred = x - x.mean(dim=1, keepdim=True)
    expected = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-3).sqrt() * weight + bias
    assert near(reference.layer_norm(x, weight, bias, 1e-3), expected)


def test_silu_mul_takes_the_first_half_as_the_gate() -> None:
    gate, up = torch.randn(3, 4), torch.randn(3, 4)
    expected = gate / (1 + torch.exp(-gate)) * up
    assert near(reference.silu_mul(torch.cat((gate, up), dim=1)), expected)


def test_gelu() -> None:
    x = torch.linspace(-4, 4, 33)
    exact = torch.tensor([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()])
    tanh = torch.tensor([v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2 for v in x.tolist()])
    assert near(reference.gelu(x, "none"), exact)
    assert near(reference.gelu(x, "tanh"), tanh)


def test_norms_of_half_precision_are_taken_in_float32() -> None:
    x = torch.randn(2, 512).bfloat16() * 100
    weight = torch.ones(512, dtype=torch.bfloat16)
    y = reference.rms_norm(x, weight, 1e-6)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference.rms_norm(x.float(), weight.float(), 1e-6).bfloat16())


def test_rotation_turns_pairs_by_the_angle_of_their_position() -> None:
    angles = torch.rand(10, 3) * 6  # rot_dim 6 of a head of 8
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    x = torch.randn(2, 3, 8)
    y = reference.rotate(x, torch.tensor([7, 2]), cos_sin)
    for token, position in enumerate((7, 2)):
        for head in range(3):
            for i in range(3):
                pair = complex(x[token, head, i], x[token, head, i + 3])
                turned = pair * complex(math.cos(angles[position, i]), math.sin(angles[position, i]))
                assert abs(turned - complex(y[token, head, i], y[token, head, i + 3])) < 1e-5
    assert torch.equal(y[..., 6:], x[..., 6:])


def test_prepare_qkv_norms_rotates_and_writes() -> None:
    heads, kv_heads, size, tokens = 4, 2, 8, 5
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size)
    q, k, v = (
        qkv[:, : heads * size].view(tokens, heads, size),
        qkv[:, heads * size : (heads + kv_heads) * size].view(tokens, kv_heads, size),
        qkv[:, (heads + kv_heads) * size :].view(tokens, kv_heads, size),
    )
    angles = torch.rand(50, 4)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.tensor([3, 49, 0, 7, 8])
    q_norm, k_norm = torch.randn(size), torch.randn(size)
    k_cache, v_cache = torch.zeros(6, kv_heads, BLOCK, size), torch.zeros(6, kv_heads, BLOCK, size)
    slots = torch.tensor([23, 0, 9, 10, 4])
    result = reference.prepare_qkv(
        qkv.clone(), heads, kv_heads, size, positions, cos_sin, q_norm, k_norm, 1e-6, k_cache, v_cache, slots
    )
    assert near(result, reference.rotate(reference.rms_norm(q, q_norm, 1e-6), positions, cos_sin))
    expected_k = reference.rotate(reference.rms_norm(k, k_norm, 1e-6), positions, cos_sin)
    for token, slot in enumerate(slots.tolist()):
        assert near(k_cache[slot // BLOCK, :, slot % BLOCK], expected_k[token])
        assert torch.equal(v_cache[slot // BLOCK, :, slot % BLOCK], v[token])
    assert int((v_cache.abs().sum(dim=(1, 3)) > 0).sum()) == tokens, "no other slot was written"


def test_prepare_qkv_without_options_only_splits() -> None:
    qkv = torch.randn(2, 24)
    cache = torch.zeros(1, 1, BLOCK, 8)
    q = reference.prepare_qkv(
        qkv,
        1,
        1,
        8,
        torch.zeros(2, dtype=torch.int64),
        None,
        None,
        None,
        0.0,
        cache,
        cache.clone(),
        torch.tensor([0, 1]),
    )
    assert torch.equal(q[:, 0], qkv[:, :8])


def random_batch(lengths: list[int], new: list[int], draw: random.Random) -> Batch:
    """Sequences of these lengths whose last `new` tokens are in the batch; blocks scattered, table padded with junk."""
    free = list(range(64))
    draw.shuffle(free)
    width = max(-(-length // BLOCK) for length in lengths) + 1
    table = [[free.pop() for _ in range(-(-length // BLOCK))] for length in lengths]
    positions = [p for length, count in zip(lengths, new, strict=True) for p in range(length - count, length)]
    owners = [s for s, count in enumerate(new) for _ in range(count)]
    slots = [table[s][p // BLOCK] * BLOCK + p % BLOCK for s, p in zip(owners, positions, strict=True)]
    padded = [row + [draw.randrange(64) for _ in range(width - len(row))] for row in table]
    starts = [sum(new[:s]) for s in range(len(new) + 1)]
    return Batch(
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=torch.tensor(padded, dtype=torch.int32),
        num_decodes=sum(count == 1 for count in new),
        max_query_len=max(new),
        max_seq_len=max(lengths),
    )


@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_paged_attention_is_a_softmax_over_what_each_token_sees(heads: int, kv_heads: int, window: int | None) -> None:
    size, scale = 8, 0.3
    lengths, new = [1, 9, 17, 5, 12], [1, 1, 1, 5, 7]
    batch = random_batch(lengths, new, random.Random(0))
    k_cache, v_cache = torch.randn(64, kv_heads, BLOCK, size), torch.randn(64, kv_heads, BLOCK, size)
    q = torch.randn(sum(new), heads, size)
    output = reference.paged_attention(q, k_cache, v_cache, batch, scale, window).view(-1, heads, size)

    token = 0
    for sequence, (length, count) in enumerate(zip(lengths, new, strict=True)):
        for position in range(length - count, length):
            first = 0 if window is None else max(0, position - window + 1)
            places = [(int(batch.block_table[sequence, p // BLOCK]), p % BLOCK) for p in range(first, position + 1)]
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                keys = torch.stack([k_cache[block, kv_head, offset] for block, offset in places])
                values = torch.stack([v_cache[block, kv_head, offset] for block, offset in places])
                weights = torch.softmax(keys @ q[token, head] * scale, dim=0)
                assert near(output[token, head], weights @ values)
            token += 1


def test_int8_rounds_to_half_a_step() -> None:
    weight = torch.randn(6, 32) * torch.logspace(-3, 3, 6)[:, None]
    weight[2] = 0
    for group_size in (None, 8):
        packed = reference.pack_int8(weight, group_size)
        step = packed.scales.repeat_interleave(32 // packed.scales.shape[1], dim=1)
        assert bool(((packed.dequantize() - weight).abs() <= step / 2 * 1.001).all())
        assert packed.scales.shape == (6, 1 if group_size is None else 4)
        assert packed.nbytes == 6 * 32 + packed.scales.numel() * 4


def test_linear_and_embedding_read_int8() -> None:
    weight, bias, x = torch.randn(12, 16), torch.randn(12), torch.randn(5, 16)
    packed = reference.pack_int8(weight)
    assert near(reference.linear(x, packed, bias), x @ packed.dequantize().T + bias)
    assert near(reference.linear_silu_mul(x, packed, bias), reference.silu_mul(x @ packed.dequantize().T + bias))
    ids = torch.tensor([3, 3, 11])
    assert near(reference.embedding(ids, packed, torch.float32), packed.dequantize()[ids])
    assert reference.embedding(ids, weight, torch.bfloat16).dtype == torch.bfloat16
    assert reference.linear(x.bfloat16(), packed, None, torch.float32).dtype == torch.float32


def test_a_weight_of_another_back_end_is_refused() -> None:
    class Foreign:
        shape = torch.Size((4, 4))
        nbytes = 0

    with pytest.raises(TypeError, match="Foreign"):
        reference.linear(torch.randn(1, 4), Foreign())


def test_dispatch_goes_to_the_reference_when_told() -> None:
    with ops.reference_only():
        assert ops.backend(False, torch.float32) is reference
        weight = torch.randn(16, 16)
        assert ops.pack_weight(weight) is weight
        assert isinstance(ops.pack_int8(weight), reference.Int8Weight)
    assert ops.backend(False, torch.float64) is reference
