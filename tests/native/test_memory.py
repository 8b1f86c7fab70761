"""Memory that is used again: the same block, never while somebody holds it."""

import ctypes
import gc
import mmap
import resource
import time
from pathlib import Path

import pytest
import torch

from crossways.assignment import Assignment
from crossways.experts import Activation, compute_experts
from crossways.native import why_not_native
from crossways.native.memory import reused, settle

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


def kibibytes_on_large_pages(tensor):
    """Of the mappings in which the tensor lies, as the kernel counts them."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            first, last = (int(part, 16) for part in words[0].split("-"))
            inside = first < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < last
        elif inside and words[0] == "AnonHugePages:":
            total += int(words[1])
    return total


@pytest.fixture
def matrices():
    """32 MB, on small pages; skips where they cannot be moved."""
    tensor = torch.ones(8, 1024, 1024)
    if kibibytes_on_large_pages(tensor):
        pytest.skip("this system gives everybody large pages")
    probe = torch.ones(8, 1024, 1024)
    settle(probe)
    if not kibibytes_on_large_pages(probe):
        pytest.skip("this system moves nothing to large pages")
    return tensor


def test_settled_tensors_keep_address_and_content(matrices):
    address, content = matrices.data_ptr(), matrices.clone()
    settle(matrices)
    assert kibibytes_on_large_pages(matrices) >= 28 * 1024
    assert matrices.data_ptr() == address
    assert torch.equal(matrices, content)


@pytest.mark.parametrize("tokens", [4, 400])  # few have a kernel of their own
def test_experts_settle_their_matrices(matrices, tokens):
    up, down = matrices[:4].view(2, 2048, 1024), torch.ones(2, 1024, 1024)
    chosen = Assignment.from_topk(torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1), 2)
    begin = time.monotonic()
    while kibibytes_on_large_pages(up) < 12 * 1024:
        compute_experts(torch.ones(tokens, 1024), chosen, up, down, Activation("swiglu"), "fused")
        assert time.monotonic() - begin < 60  # other tests of this process may have used up what is for free


def test_memory_that_was_given_back_settles_again(matrices):
    """Small pages at an address that was settled: as when a model is gone and the next one gets its memory."""
    settle(matrices)
    page = 2**21
    first = -(-matrices.data_ptr() // page) * page
    region = ctypes.c_void_p(first), ctypes.c_size_t((matrices.data_ptr() + matrices.nbytes) // page * page - first)
    madvise = ctypes.CDLL(None).madvise
    assert madvise(*region, mmap.MADV_NOHUGEPAGE) == 0
    assert madvise(*region, mmap.MADV_DONTNEED) == 0
    matrices.fill_(1)
    assert madvise(*region, mmap.MADV_HUGEPAGE) == 0
    assert kibibytes_on_large_pages(matrices) == 0
    settle(matrices)
    assert kibibytes_on_large_pages(matrices) >= 28 * 1024
    assert (matrices == 1).all()


@pytest.mark.parametrize("size", [0, 3, 2**19])
def test_what_fills_no_large_page_stays(size):
    tensor = torch.arange(size, dtype=torch.float32)
    settle(tensor)
    assert torch.equal(tensor, torch.arange(size, dtype=torch.float32))
