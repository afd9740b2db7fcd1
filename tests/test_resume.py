"""A run killed with SIGKILL and resumed ends like one nobody touched.

``python -m tests.kill_and_resume --kills 10`` does the same more often.
"""

import pytest

from tests import kill_and_resume


@pytest.mark.slow  # test_processes kills one of two, and resumes
def test_a_killed_run_ends_with_the_same_bits(capsys):
    kill_and_resume.main(kills=1, num_steps=24, seed=1)
    assert "arrays are identical" in capsys.readouterr().out
