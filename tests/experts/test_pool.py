"""Memory that the loop backend uses again: the same block, never while somebody holds it, never without bound."""

import gc
import mmap
import threading

import pytest
import torch

from crossways.assignment import Assignment
from crossways.experts import Activation, compute_experts, pool
from crossways.experts.pool import Pool

LIKE = torch.empty(0, dtype=torch.bfloat16)
LARGE = 3 * 2**21


def page_of(block):
    """The large page in which a block begins."""
    return block.data_ptr() // 2**21


def test_a_block_comes_back_when_its_last_tensor_is_gone():
    blocks = Pool()
    first = blocks.take(LARGE)
    view, page = first[5:].fill_(1), page_of(first)
    del first
    gc.collect()
    other = blocks.take(LARGE).fill_(2)
    assert page_of(other) != page
    assert (view == 1).all()
    del view
    gc.collect()
    assert page_of(blocks.take(LARGE)) == page


def test_what_was_used_last_is_used_first():
    blocks = Pool()
    cold, warm = blocks.take(LARGE), blocks.take(LARGE)
    page = page_of(warm)
    del cold
    gc.collect()
    del warm
    gc.collect()
    assert page_of(blocks.take(LARGE)) == page


def waiting(blocks):
    """Bytes that wait, once those that came back were looked at."""
    blocks._collect()
    return sum(block.size for block in blocks._waiting)


def test_no_more_waits_than_was_in_use_at_once():
    blocks = Pool()
    most = 0
    for size in range(1, 20):
        held = [blocks.take(size * 2**21) for _ in range(2)]
        most = max(most, sum(len(one) + 2**21 for one in held))
        del held
        gc.collect()
        assert waiting(blocks) <= most


def test_a_block_is_not_given_for_much_less():
    blocks = Pool()
    page = page_of(blocks.take(10 * 2**21))
    gc.collect()
    assert page_of(blocks.take(3 * 2**21)) != page


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="the system cannot take pages of memory that is kept")
def test_the_system_may_take_what_waits_long():
    blocks = Pool()
    held = [blocks.take(LARGE), blocks.take(4 * LARGE)]
    del held
    gc.collect()
    waiting(blocks)
    assert [block.marked for block in blocks._waiting] == [False, False]
    for _ in range(70):
        blocks.take(LARGE)
    assert sorted((block.size, block.marked) for block in blocks._waiting) == [(13 * 2**21, True)]
    assert (blocks.take(4 * LARGE).fill_(3) == 3).all()


def test_tensors_do_not_all_begin_where_a_page_does():
    blocks = Pool()
    starts = {blocks.take(LARGE).data_ptr() % 4096 for _ in range(16)}
    assert len(starts) == 16
    assert all(start % 64 == 0 for start in starts)


def test_threads_never_share_a_block():
    blocks, wrong = Pool(), []

    def work(mark):
        for _ in range(200):
            block = blocks.take(2**21).fill_(mark)
            if not (block == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("shape", [(), (0,), (5, 7), (3, 1024, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=str)
def test_it_is_a_plain_tensor(shape, dtype):
    x = pool.empty(shape, LIKE, dtype)
    assert x.shape == torch.Size(shape)
    assert x.dtype == (dtype or torch.bfloat16)
    assert x.is_contiguous()
    assert not x.requires_grad
    assert (x.fill_(3) + 1 == 4).all()


def test_gradients_that_somebody_holds_stay_as_they_are():
    generator = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(shape, generator=generator) for shape in ((64, 256), (4, 1024, 256), (4, 256, 512)))
    index = torch.randint(4, (64, 1), generator=generator)
    assignment = Assignment.from_topk(index, torch.ones(64, 1), 4)
    up.requires_grad_()
    compute_experts(x, assignment, up, down, Activation("swiglu"), "loop").sum().backward()
    assert up.grad is not None
    held, kept = up.grad, up.grad.clone()
    assert held.nbytes > pool._SMALL
    for scale in (2, 3):
        up.grad = None
        compute_experts(scale * x, assignment, up, down, Activation("swiglu"), "loop").sum().backward()
        assert not torch.equal(up.grad, kept)
        assert torch.equal(held, kept)
