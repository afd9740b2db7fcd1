"""Measures the time and memory of imports of published weights, at full size.

    python -m benchmarks.import_weights
    python -m benchmarks.import_weights --models resnet101 --scratch=/scratch

Each file has the names and shapes of torchvision's file. A separate process imports it. Memory is
the peak of that process (Linux) above its level after loading all modules; pages of the mapped file
count.
"""

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, Literal, get_args

import numpy as np
import tyro
from flax import traverse_util
from safetensors.numpy import save_file

from dense_jax import runs
from dense_jax.errors import UserError
from dense_jax.releases import catalogue
from dense_jax.train import cli
from dense_jax.weights import rules

# torchvision's networks that this library has whole, and segnet, whose encoder takes vgg16_bn.
Name = Literal[
    "vgg16",
    "segnet",
    "resnet50",
    "resnet101",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
]
_CLASSIFIER = {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}  # of torchvision's VGGs
_IMPORT = """
import json, pathlib, re, sys, time
from dense_jax.commands import import_weights
from dense_jax.releases import catalogue
catalogue.families()
status = pathlib.Path("/proc/self/status")
def peak(): return int(re.search("VmHWM: *\\t *(\\d+) kB", status.read_text())[1]) / 1024
before, start = peak(), time.perf_counter()
name, source, out = sys.argv[1:]
import_weights.run(model=name, source=source, out=pathlib.Path(out), new_head=name == "segnet")
print(json.dumps([time.perf_counter() - start, peak() - before]))
"""


def published(name: Name) -> dict[str, np.ndarray]:
    """Returns arrays with the names and shapes of torchvision's file for a network."""
    is_segmenter = name.startswith(("fcn", "deeplab"))
    template: Any = rules.template_of(catalogue.build(name, aux=is_segmenter))
    leaves = traverse_util.flatten_dict(template, sep="/")
    releases = [r for r in catalogue.releases() if r.name.startswith("torchvision")]
    tensors = max((_known(leaves, release) for release in releases), key=len)
    if name in ("vgg16", "segnet"):  # the file also has a classifier that is not imported
        for i, shape in _CLASSIFIER.items():
            weight = np.broadcast_to(np.float32(0.5), shape)
            bias = weight[:, 0]
            tensors = {f"classifier.{i}.weight": weight, f"classifier.{i}.bias": bias} | tensors
    return {key: np.ascontiguousarray(values) for key, values in tensors.items()}


def _known(leaves: dict[str, Any], release: rules.Release) -> dict[str, np.ndarray]:
    """Returns the parameters that a release has, under their names there."""
    tensors = {}
    for path, leaf in leaves.items():
        values = np.broadcast_to(np.float32(0.5), leaf.shape)
        with contextlib.suppress(UserError):
            variables = traverse_util.unflatten_dict({path: values}, sep="/")
            tensors |= rules.unload(variables, release.rules)
    return tensors


def main(models: tuple[Name, ...] = get_args(Name), scratch: pathlib.Path | None = None) -> None:
    """Prints a row for each network.

    Args:
      models: the networks to import; segnet takes vgg16_bn.
      scratch: folder for temporary files. Default: the system's.
    """
    if scratch is not None:
        runs.make_folder(scratch)
    print("| network | tensors | file, MB | seconds | memory, MB | memory / file |")
    print("|---|---|---|---|---|---|")
    for name in models:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            path = pathlib.Path(folder) / "weights.safetensors"
            tensors = published(name)
            save_file(tensors, path)
            num_tensors = len(tensors)
            del tensors
            size = path.stat().st_size / 2**20
            command = [sys.executable, "-c", _IMPORT, name, str(path), f"{folder}/out"]
            process = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, memory = json.loads(process.stdout.splitlines()[-1])
            row = f"{num_tensors} | {size:.0f} | {seconds:.1f} | {memory:.0f} | {memory / size:.2f}"
            print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    with cli.exit_on_user_error():
        tyro.cli(main, prog="python -m benchmarks.import_weights")
