"""Plans the runs of a sweep: every combination of flag values, checked before the first run."""

import dataclasses
import hashlib
import itertools
import pathlib
import re
import shlex
from collections.abc import Sequence

from dense_jax.errors import UserError
from dense_jax.scripts import Script
from dense_jax.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      settings: value of each varied flag.
      seed: its seed.
      workdir: its folder.
      words: the arguments of "python -m".
      stages: the configurations that the script trains in turn; the last is scored.
      processes: the flags that join many processes, which `words` has too.
    """

    settings: dict[str, str]
    seed: int
    workdir: pathlib.Path
    words: tuple[str, ...]
    stages: tuple[RunConfig, ...]
    processes: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command line, for a shell."""
        return shlex.join(["python", "-m", *self.words])

    @property
    def log(self) -> pathlib.Path:
        """The file with the output of its processes."""
        return self.workdir / "log.txt"

    @property
    def final(self) -> pathlib.Path:
        """The folder of the last stage."""
        return pathlib.Path(self.stages[-1].workdir or "")


def plan(
    script: Script,
    preset: str,
    flags: Sequence[str],
    vary: Sequence[str],
    seeds: int,
    out: pathlib.Path,
    processes: Sequence[str] = (),
) -> list[Run]:
    """Returns all runs, all combinations of seed 0 first. It checks each command.

    Args:
      script: the script.
      preset: one of its presets.
      flags: flags for every run.
      vary: FLAG=VALUE,VALUE,... for each varied flag.
      seeds: number of runs of each combination.
      out: folder of the sweep.
      processes: the flags that join many processes.

    Raises:
      UserError: the script does not take a flag, value or preset; the message names the first.
    """
    if seeds < 1:
        raise UserError(f"--seeds={seeds}: give at least 1")
    if preset not in script.presets:
        known = ", ".join(script.presets)
        raise UserError(f"{script.name} has no preset {preset}: give {known}")
    varied = [_varied(text) for text in vary]
    fixed = [_name(word) for word in flags if word.startswith("--")]
    names = [name for name, _ in varied]
    for name in names + fixed:
        if name in ("distributed", "coordinator", "process-id", "num-processes"):
            raise UserError(f"--{name} belongs to the sweep: give it before the --")
        if name in ("seed", "workdir"):
            raise UserError(f"--{name} belongs to the sweep: give --seeds, --out")
        if (names + fixed).count(name) > 1:
            raise UserError(f"--{name} is given twice: vary it once, or set it once")
    planned = []
    for seed in range(seeds):
        for values in itertools.product(*(values for _, values in varied)):
            settings = dict(zip(names, values, strict=True)) or {"preset": preset}
            workdir = out / _folder_name({**settings, "seed": str(seed)})
            words = [preset, *flags]
            for name, value in zip(names, values, strict=True):
                words += _flag(name, value, script.presets[preset])
            words += [f"--seed={seed}", f"--workdir={workdir}", *processes]
            stages = tuple(script.parse(words).each_stage())
            for stage in stages:
                script.build(stage, 2)  # raises UserError if flags do not go together
            every = (script.name, *words)
            planned.append(Run(settings, seed, workdir, every, stages, tuple(processes)))
    return planned


def _varied(text: str) -> tuple[str, list[str]]:
    """Splits FLAG=VALUE,VALUE,..."""
    name, _, values = text.partition("=")
    split = [value.strip() for value in values.split(",")]
    if not _name(name) or not all(split):
        raise UserError(f"--vary={text}: give FLAG=VALUE,VALUE,...")
    if len(set(split)) < len(split):
        raise UserError(f"--vary={text}: a value comes twice; give each value once")
    return _name(name), split


def _name(flag: str) -> str:
    return flag.partition("=")[0].strip().removeprefix("--").replace("_", "-")


def _flag(name: str, value: str, defaults: RunConfig) -> list[str]:
    """Returns the words that set a flag; a boolean flag takes True and False."""
    if isinstance(getattr(defaults, name.replace("-", "_"), None), bool):
        if value not in ("True", "False"):
            raise UserError(f"--{name}={value}: give True or False")
        return [f"--{name}" if value == "True" else f"--no-{name}"]
    words = shlex.split(value)
    return [f"--{name}", *words] if len(words) > 1 else [f"--{name}={value}"]


def _folder_name(settings: dict[str, str]) -> str:
    """Returns a readable name that differs for different settings."""
    full = "_".join(f"{name}={value}" for name, value in settings.items())
    plain = re.sub(r"[^A-Za-z0-9_.=-]+", "-", full)[:120]
    return plain if plain == full else f"{plain}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"
