"""Nyström attention: landmarks and its two long softmaxes by kernels, beside torch's."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.agree import agree, operands, poisoned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pinv", ["iterative", "exact"])
def test_rows_agree_with_torch(dtype: torch.dtype, pinv: str) -> None:
    q, k, v = operands(40, 40, D=16, dtype=dtype)
    agree(q, k, v, backend="nystrom", params={"num_landmarks": 8, "pinv": pinv}, causal=False)


def test_ugly_shapes_and_batches_agree_with_torch() -> None:
    q, k, v = operands(33, 70, B=2, H=3, Hk=1, D=24, Dv=17)
    agree(q, k, v, backend="nystrom", params={"num_landmarks": 7}, causal=False, scale=-0.3)


def test_fewer_positions_than_landmarks_are_landmarks_themselves() -> None:
    q, k, v = operands(5, 9, H=2, Hk=2, D=16)
    agree(q, k, v, backend="nystrom", params={"num_landmarks": 64}, causal=False, start=0)


def test_keys_split_into_parts_are_added_up_by_their_log_sum_exp() -> None:
    from kernels._triton.linear_landmarks import attend_keys, num_parts
    from kernels._triton.targets import TARGETS

    assert num_parts(700, 1, TARGETS[90]) == 2 and num_parts(100, 1, TARGETS[90]) == 1
    rows, k, v = operands(3, 700, D=16)
    with poisoned():
        got = attend_keys(rows, k, v, 0.9)
    want = torch.softmax(0.9 * rows @ k.mT, -1) @ v
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
