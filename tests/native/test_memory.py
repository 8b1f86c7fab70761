"""Memory that is used again: the same block, never while somebody holds it."""

import gc
import resource

import pytest
import torch

from crossways.native import why_not_native
from crossways.native.memory import reused

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))

SHAPE = (3, 1024, 1024)
OWN_SHAPE = (37, 1024, 1024)
"""So large that no other test's blocks would do."""


def test_a_block_comes_back_when_its_last_tensor_is_gone():
    first = reused(OWN_SHAPE, torch.float32).fill_(1)
    view, address = first[1], first.data_ptr()
    del first
    gc.collect()
    other = reused(OWN_SHAPE, torch.float32).fill_(2)
    assert other.data_ptr() != address
    assert (view == 1).all()
    del view
    gc.collect()
    assert reused(OWN_SHAPE, torch.float32).data_ptr() == address


def test_a_small_block_comes_back_though_a_large_one_waits():
    """Who changes to smaller batches keeps the new blocks, not those of the large ones."""

    def faults_of_filling(mebibytes):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        reused((mebibytes, 2**18), torch.float32).fill_(1)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults_of_filling(301)
    faults_of_filling(101)
    assert faults_of_filling(101) < 10


@pytest.mark.parametrize("shape", [(), (0,), (5, 7), SHAPE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_a_plain_tensor(shape, dtype):
    x = reused(shape, dtype)
    assert x.shape == torch.Size(shape)
    assert x.dtype == dtype
    assert x.is_contiguous()
    assert not x.requires_grad
    assert (x.fill_(3) + 1 == 4).all()
