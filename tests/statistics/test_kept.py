import torch

from lightning_prehab.statistics.kept import KEPT_BYTES, MOST_BATCHES, KeptBatches


def test_batches_are_copied_and_few_are_kept():
    kept, batch = KeptBatches(), [torch.ones(4)]
    for number in range(MOST_BATCHES + 3):
        kept.keep(batch, number)
    batch[0].zero_()
    assert [number for _, number in kept] == list(range(MOST_BATCHES))
    assert all(torch.equal(copied[0], torch.ones(4)) for copied, _ in kept)
    large, kept = torch.empty(KEPT_BYTES // 4 // 2, device="meta"), KeptBatches()
    for number in range(5):
        kept.keep(large, number)
    assert len(kept) == 2
    huge, kept = torch.empty(KEPT_BYTES, device="meta"), KeptBatches()
    for number in range(5):
        kept.keep(huge, number)
    assert len(kept) == 1


def test_what_cannot_be_copied_is_not_kept():
    kept = KeptBatches()
    non_leaf = torch.ones(2, requires_grad=True) * 2
    for batch in ([non_leaf], {"x": torch.ones(2), "more": (one for one in "abc")}):
        kept.keep(batch, 0)
    assert kept == []
    for number in range(3):  # objects of unknown size: one
        kept.keep(object(), number)
    assert len(kept) == 1


def test_batches_pass_and_are_kept():
    kept = KeptBatches()
    passing = kept.passing([torch.ones(2), torch.zeros(2)])
    assert len(passing) == 2
    assert [float(batch.sum()) for batch in passing] == [2.0, 0.0]
    assert [number for _, number in kept] == [0, 1]
    assert len(list(passing)) == len(kept) == 2  # gone through again, they are not kept twice
    assert [float(batch) for batch in KeptBatches().passing(iter([torch.ones(())]))] == [1.0]
