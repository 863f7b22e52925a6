from __future__ import annotations

import pytest
import torch

from models import pages as pages_module
from models.arena import PAGE_TOKENS, LayerShape
from models.kv_cache import CLOSED, Cache
from models.new_rows import NewRow, NewRows
from models.pages import PagePool

SHAPES = [LayerShape(2, 4, 6), LayerShape(1, 8, 8)]
CPU = torch.device("cpu")


def cache_of(pool: PagePool, length: int, seed: int) -> Cache:
    """A cache that holds ``length`` rows."""
    cache = Cache(SHAPES, length + 2, torch.float64, CPU, pool)
    generator = torch.Generator().manual_seed(seed)
    for layer, shape in enumerate(SHAPES):
        k = torch.rand(shape.num_kv_heads, length, shape.key_dim, generator=generator, dtype=torch.float64)
        v = torch.rand(shape.num_kv_heads, length, shape.value_dim, generator=generator, dtype=torch.float64)
        cache.write(layer, 0, k, v)
    return cache


def packed(layer: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(99 + layer)
    shape = SHAPES[layer]
    size = shape.num_kv_heads, num_rows
    return (
        torch.rand(*size, shape.key_dim, generator=generator, dtype=torch.float64),
        torch.rand(*size, shape.value_dim, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("pages_of_an_arena", [1, 8])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [5, 0, 3, 1]])
def test_rows_placed_together_equal_rows_written_one_by_one(
    order: list[int], pages_of_an_arena: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages_module, "RESERVED_PAGES", pages_of_an_arena)
    lengths = [3, PAGE_TOKENS - 1, PAGE_TOKENS, 2 * PAGE_TOKENS + 5]
    num_rows = max(order) + 1
    together, alone = (
        [
            cache_of(PagePool(SHAPES, torch.float64, CPU) if not i else pool, n, i)
            for i, n in enumerate(lengths)
        ]
        for pool in (PagePool(SHAPES, torch.float64, CPU), PagePool(SHAPES, torch.float64, CPU))
    )
    rows = [NewRow(each, length, row) for each, length, row in zip(together, lengths, order, strict=True)]
    new = NewRows(rows, CPU)
    assert new.placed == set(order)
    for layer in range(len(SHAPES)):
        k, v = packed(layer, num_rows)
        new.write(layer, k, v)
        for one, other, length, row in zip(together, alone, lengths, order, strict=True):
            other.write(layer, length, k[:, row : row + 1], v[:, row : row + 1])
            for a, b in zip(
                one.keys_values(layer, length + 1), other.keys_values(layer, length + 1), strict=True
            ):
                assert torch.equal(a, b)
    assert [each.held_bytes for each in together] == [each.held_bytes for each in alone]


def test_rows_of_a_sequence_whose_pages_are_being_moved_are_left_to_it() -> None:
    pool = PagePool(SHAPES, torch.float64, CPU)
    pool.limit_cached(1 << 20)
    first = cache_of(pool, PAGE_TOKENS + 3, 0)
    fork = first.fork(PAGE_TOKENS + 8, PAGE_TOKENS + 3)
    other = cache_of(pool, 7, 1)
    new = NewRows([NewRow(fork, PAGE_TOKENS + 3, 0), NewRow(other, 7, 1)], CPU)
    assert new.placed == {1}


def test_a_closed_sequence_is_refused_before_anything_is_written() -> None:
    pool = PagePool(SHAPES, torch.float64, CPU)
    one, other = cache_of(pool, 5, 0), cache_of(pool, 6, 1)
    new = NewRows([NewRow(one, 5, 0), NewRow(other, 6, 1)], CPU)
    other.close()
    before = one.keys_values(0, 7)[0].clone()
    with pytest.raises(RuntimeError, match=CLOSED):
        new.write(0, *packed(0, 2))
    assert torch.equal(one.keys_values(0, 7)[0], before)
