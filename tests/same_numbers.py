"""Compares the smoke runs of this version with those of another commit, bit for bit.

    python -m tests.same_numbers --commit e0a3f22
    python -m tests.same_numbers --commit main --scripts fcn segnet

Both versions train each script for two steps, in processes of their own. All arrays of the last
checkpoint, the data position, the scores and the confusion matrix must be equal. Two kinds of
scores are not compared bit for bit, since images are predicted one by one on CPUs, which e0a3f22
did not: the loss may differ by rounding, and the variances of Bayesian SegNet come from other
random masks.
"""

import json
import math
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import tyro

from tests import ROOT, SCRIPTS
from tests.kill_and_resume import final_state

NOT_COMPARED = ("loss", "variance_right", "variance_wrong")


def smoke_run(code: pathlib.Path, script: str, workdir: pathlib.Path) -> pathlib.Path:
    """Runs a script of the code in a folder; returns the run."""
    words = [sys.executable, "-m", f"experiments.{script}", "smoke", f"--workdir={workdir}"]
    subprocess.run(words, cwd=code, check=True, capture_output=True)
    return workdir


def scores(run: pathlib.Path) -> dict[str, Any]:
    """The scores and the confusion matrix of a run; a NaN of earlier versions is None."""
    record = json.loads((run / "evaluation.json").read_text())
    values = {
        name: None if value is None or math.isnan(value) else value
        for name, value in record["scores"].items()
    }
    return {**values, "confusion": record["confusion"]}


def main(commit: str, scripts: tuple[str, ...] = tuple(SCRIPTS)) -> None:
    """Compares runs of this version with those of a commit; stops at the first difference."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        other = path / "code"
        subprocess.run(["git", "clone", "-q", ROOT, other], check=True)
        subprocess.run(["git", "checkout", "-q", commit], cwd=other, check=True)
        for script in scripts:
            if not (other / "experiments" / f"{script}.py").exists():
                print(f"{script}: new since {commit}")
                continue
            before = smoke_run(other, script, path / "before" / script)
            after = smoke_run(ROOT, script, path / "after" / script)
            expected, actual = (final_state(run, num_steps=2) for run in (before, after))
            assert expected.keys() == actual.keys()
            for key, value in expected.items():
                np.testing.assert_array_equal(actual[key], value, err_msg="/".join(key))
            old, new = scores(before), scores(after)
            np.testing.assert_allclose(new["loss"], old["loss"], rtol=1e-6)
            old = {name: value for name, value in old.items() if name not in NOT_COMPARED}
            different = [name for name in old if new.get(name) != old[name]]
            assert not different, f"{script}: other {', '.join(different)}"
            print(f"{script}: {len(expected)} arrays and {len(old)} results are identical")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m tests.same_numbers")
