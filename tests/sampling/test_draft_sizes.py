"""Which batches are decoded with drafts, and the warning if a run has none."""

import itertools
import re

import pytest

from discover_jax.sampling.draft_sizes import MOST_DRAFT, MOST_READ, draft_rows, drafts_warning, largest_with_drafts, rows_of
from discover_jax.sampling.schedule import FEWEST_ROWS


def _batches(rows, devices):
    """All sizes that the tail halves a batch to, by the rule of the schedule."""
    sizes = [rows]
    while sizes[-1] // 2 >= FEWEST_ROWS and sizes[-1] // 2 % devices == 0:
        sizes.append(sizes[-1] // 2)
    return sizes


SLOTS, ROLLOUTS, DEVICES, DRAFTS = (
    (1, 7, 8, 9, 12, 15, 16, 24, 60, 96, 128, 200, 257),
    (6, 12, 512),
    (1, 2, 3, 8, 64, 100),
    (1, 3, 7, 9, 15),
)


@pytest.mark.parametrize("devices", DEVICES)
def test_warns_if_no_batch_reads_few_enough_tokens(devices):
    for slots, rollouts, drafts in itertools.product(SLOTS, ROLLOUTS, DRAFTS):
        rows = rows_of(slots, rollouts, devices)
        with_drafts = [size for size in _batches(rows, devices) if size * (drafts + 1) <= MOST_READ]
        assert largest_with_drafts(rows, devices, draft_rows(drafts)) == max(with_drafts, default=0)
        said = drafts_warning(slots, rollouts, devices, drafts)
        assert (said is None) == bool(with_drafts)
        assert drafts_warning(slots, rollouts, devices, 0) is None


@pytest.mark.parametrize("devices", DEVICES)
def test_each_remedy_of_the_warning_works(devices):
    remedies = 0
    for slots, rollouts, drafts in itertools.product(SLOTS, ROLLOUTS, DRAFTS):
        said = drafts_warning(slots, rollouts, devices, drafts)
        if said is None:
            continue
        assert f"config.sampling.draft_tokens = {drafts} has no effect" in said
        assert str(rows_of(slots, rollouts, devices)) in said
        if shorter := re.search(r"draft_tokens to at most (\d+)", said):
            assert 0 < int(shorter[1]) < drafts
            assert drafts_warning(slots, rollouts, devices, int(shorter[1])) is None
            assert drafts_warning(slots, rollouts, devices, int(shorter[1]) + 1) is not None
        if other := re.search(r"slots to (\d+)", said):
            assert drafts_warning(int(other[1]), rollouts, devices, drafts) is None
        remedies += bool(shorter) + bool(other)
        assert shorter or other or "draft_tokens to 0" in said
    assert remedies or devices == 100


def test_twelve_slots_are_too_many_for_the_longest_drafts():
    said = drafts_warning(12, 512, 1, MOST_DRAFT)
    assert said is not None
    assert "at most 8 rows" in said
    assert "begins with 12 rows and cannot be halved" in said
    assert "draft_tokens to at most 9 or slots to 8." in said
