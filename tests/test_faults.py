"""A small campaign of damages; ``python -m tests.faults`` is the large one."""

import random

from tests import faults


def test_no_damage_is_silent_or_a_traceback(tmp_path):
    with faults.unchanged_environment():
        tallies = faults.damage_files(5, random.Random(1), tmp_path)
    assert sum(tally.tried for tally in tallies.values()) == 5
    for area, tally in tallies.items():
        assert (tally.lost, tally.silent, tally.traceback) == (0, 0, 0), area
