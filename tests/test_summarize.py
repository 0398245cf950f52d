"""The summary of a run."""

from collections.abc import Sequence

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given, settings
from hypothesis import strategies as st

from reembed.transforms.rows import Cause, KeyRange, Skipped, StagedRange, Summary
from reembed.transforms.summarize import SummarizeRun, summarize_run
from tests.test_rows import summaries

KEYS = KeyRange(0, None, None)


@settings(max_examples=20)
@given(st.lists(summaries))
def test_parts_may_be_combined_in_any_bundles(parts: list[Summary]) -> None:
    middle = len(parts) // 2
    bundles = [summarize_run(parts[:middle]), summarize_run(parts[middle:])]

    assert summarize_run(bundles) == summarize_run(parts)


@pytest.mark.system
@pytest.mark.parametrize(
    ("staged", "skipped", "summary"),
    [
        ([], [], Summary()),
        (
            [StagedRange(KEYS, "a", 3, 1), StagedRange(KEYS, "b", 2, 0)],
            [Skipped("k", Cause.REJECTED, "why")],
            Summary(embedded=5, skipped={Cause.REJECTED: 1}),
        ),
    ],
    ids=["no rows", "rows"],
)
def test_one_summary_comes_out(
    staged: Sequence[StagedRange],
    skipped: Sequence[Skipped],
    summary: Summary,
) -> None:
    with beam.Pipeline(runner="FnApiRunner") as root:
        outcomes = (
            root | "A" >> beam.Create(staged),
            root | "B" >> beam.Create(skipped),
        )
        assert_that(outcomes | SummarizeRun(), equal_to([summary]))
