"""The figure of a moving box shows steps of RoIPool and RoIWarp and a line of RoIAlign."""

import numpy as np
import pytest

from dense_jax.analysis import roi_figures
from dense_jax.analysis.roi_figures import SHIFTS, STRIDE


@pytest.mark.slow
def test_only_align_follows_the_box(tmp_path):
    ramp, _ = roi_figures.FEATURES.values()
    lines = roi_figures.curves(ramp)
    np.testing.assert_allclose(np.diff(lines["RoIAlign"]), np.diff(SHIFTS) / STRIDE, atol=1e-5)
    for name in ("RoIPool", "RoIWarp"):
        steps = np.diff(lines[name])
        assert set(np.round(steps, 5)) == {0, 1}
        # Corners are at 2.25 cells: after 4 pixels they are at 2.5, and are rounded up.
        np.testing.assert_array_equal(SHIFTS[1:][steps > 0.5], [4, 20, 36])
    roi_figures.main(roi_figures.Config(path=tmp_path / "shift"))
    assert (tmp_path / "shift.svg").read_text().count("RoIAlign") == 1
    assert (tmp_path / "shift.png").stat().st_size > 1000
