"""A few of the random kills of `python -m tests.kills`, which does as many as it is asked for."""

from __future__ import annotations

import pytest

from tests import kills

KILLS = 4


@pytest.mark.system
def test_whatever_is_killed_no_table_is_mixed_and_no_backup_is_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = kills.main(["--seed", "57", "--kills", str(KILLS), "--runner", kills.LOOP])
    printed = capsys.readouterr().out
    print(printed)

    assert code == 0, printed
