"""The evaluation protocol: each token scored once, with the context that the protocol promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossways.errors import UserError
from crossways.training.windows import IGNORED, batch_windows, evaluation_windows

BOS = 7


def scored(result):
    """(context, token) of every scored token, as a model that shifts labels sees them."""
    for item in result.windows:
        ids, labels = item.input_ids.tolist(), item.labels.tolist()
        assert len(ids) == len(labels)
        assert labels[0] == IGNORED  # the first position has no prediction
        for position, label in enumerate(labels):
            if label != IGNORED:
                assert label == ids[position]
                yield tuple(ids[:position]), label


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(1, 25), min_size=1, max_size=6))
    # Every token of every document is distinct, so a token says which document and place it comes from.
    documents = [[100 * (d + 1) + i for i in range(length)] for d, length in enumerate(lengths)]
    window = draw(st.integers(2, 12))
    return documents, window, draw(st.integers(1, window))


@given(case=cases())
def test_each_token_once_with_its_documents_preceding_tokens(case):
    documents, window, stride = case
    result = evaluation_windows(documents, [len(ids) for ids in documents], window, stride, BOS)
    assert max(len(item.input_ids) for item in result.windows) <= window
    pairs = list(scored(result))
    assert [token for _, token in pairs] == [token for ids in documents for token in ids]
    step = min(stride, window - 1)
    for context, token in pairs:
        document = [BOS, *documents[token // 100 - 1]]
        place = document.index(token)
        assert list(context) == document[place - len(context) : place]
        assert len(context) >= min(place, window - step)  # what the stride promises
    assert result.num_tokens == sum(map(len, documents)) == result.num_bytes
    assert result.num_documents == len(documents)


def test_by_hand():
    result = evaluation_windows([[1, 2, 3, 4, 5]], [5], window=4, stride=2, bos_id=0)
    found = [(item.input_ids.tolist(), item.labels.tolist()) for item in result.windows]
    assert found == [([0, 1, 2, 3], [-100, 1, 2, 3]), ([2, 3, 4, 5], [-100, -100, 4, 5])]


def test_stride_of_a_window_shares_only_the_token_of_context():
    result = evaluation_windows([[1, 2, 3, 4, 5, 6]], [6], window=4, stride=4, bos_id=0)
    assert [item.input_ids.tolist() for item in result.windows] == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert [item.labels.tolist() for item in result.windows] == [[-100, 1, 2, 3], [-100, 4, 5, 6]]


def test_one_token_document():
    result = evaluation_windows([[5]], [3], window=64, stride=64, bos_id=0)
    assert [item.input_ids.tolist() for item in result.windows] == [[0, 5]]
    assert (result.num_tokens, result.num_bytes) == (1, 3)


@given(case=cases(), budget=st.integers(1, 80))
def test_budget_takes_whole_documents_and_counts_their_bytes(case, budget):
    documents, window, stride = case
    sizes = [10 * len(ids) + 1 for ids in documents]
    result = evaluation_windows(documents, sizes, window, stride, BOS, max_tokens=budget)
    kept = result.num_documents
    assert [token for _, token in scored(result)] == [token for ids in documents[:kept] for token in ids]
    assert result.num_bytes == sum(sizes[:kept])
    assert result.num_tokens <= budget or kept == 1
    assert kept == len(documents) or result.num_tokens + len(documents[kept]) > budget


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 0), (4, 5)])
def test_impossible_sizes(window, stride):
    with pytest.raises(UserError, match=f"window={window}, stride={stride}"):
        evaluation_windows([[1]], [1], window, stride, BOS)


def test_nothing_to_score_or_unequal_lists():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluation_windows([], [], 4, 4, BOS)
    with pytest.raises(ValueError, match="zip"):
        evaluation_windows([[1], [2]], [1], 4, 4, BOS)


@given(case=cases(), batch_size=st.integers(1, 5))
def test_batches_hold_every_window_and_mask_padding(case, batch_size):
    documents, window, stride = case
    windows = evaluation_windows(documents, map(len, documents), window, stride, BOS).windows
    rows, widths = [], []
    for batch in batch_windows(windows, batch_size, pad_id=3):
        widths.append(batch["input_ids"].shape[1])
        for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert ids[length:].eq(3).all()
            assert labels[length:].eq(IGNORED).all()
            rows.append((ids[:length].tolist(), labels[:length].tolist()))
    assert sorted(rows) == sorted((item.input_ids.tolist(), item.labels.tolist()) for item in windows)
    assert widths == sorted(widths, reverse=True)
    assert len(widths) == -(-len(windows) // batch_size)


def test_batches_are_deterministic_and_the_total_does_not_depend_on_them():
    documents = [[1, 2, 3, 4, 5, 6, 7], [2, 3], [4]]
    windows = evaluation_windows(documents, [7, 2, 1], 4, 2, BOS).windows
    logits_VV = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))

    def total(batch_size):
        nll = 0.0
        for batch in batch_windows(windows, batch_size, pad_id=0):
            predicted, labels = logits_VV[batch["input_ids"][:, :-1]], batch["labels"][:, 1:]
            nll += torch.nn.functional.cross_entropy(
                predicted.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
        return nll

    pairs = [pair for ids in documents for pair in zip([BOS, *ids], ids, strict=False)]
    expected = -sum(logits_VV.log_softmax(-1)[a, b].item() for a, b in pairs)
    assert [total(size) for size in (1, 2, 5)] == pytest.approx([expected] * 3)
    with pytest.raises(ValueError, match="batch_size=0"):
        next(batch_windows(windows, 0, 0))
