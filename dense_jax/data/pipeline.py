"""Batches for training (endless, seeded, resumable) and for evaluation (each image once).

A batch is a dict of NumPy arrays: ``images`` float32 [B, H, W, C], ``labels`` int32 [B, H, W],
``valid`` bool [B] (False for padding) and ``index`` int32 [B] (the index in the split, -1 for
padding). Examples with ``weights`` add float32 [B, H, W]; those with boxes add what
`dense_jax.data.box_masks.SampleBoxes` gives them; those with ``objects`` add the arrays of
`dense_jax.data.detection.PadObjects`, each with a leading axis B. Evaluation, and training in
several shapes, add ``size`` int32 [B, 2], the height and width before padding. Images are larger
than their labels if a transform adds context on all sides.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.dataset import Example, Part, Source
from dense_jax.data.normalise import Normalise, num_channels
from dense_jax.data.padded import Shapes, Size, pad, padded_shapes
from dense_jax.data.transforms import Resize, ResizeBy, Transform
from dense_jax.errors import UserError

Batch = dict[str, Any]

_ENDLESS = 2**32  # Epochs; Grain's own endless repetition overflows with batches of one.

# Keys of an example that do not become an array of a batch, or become one of another name.
_OWN = ("image", "label", "name", "index", "instances", "keypoints", "annotations", "image_id")


class TrainBatches(Iterator[Batch]):
    """An endless iterator of training batches; made by `train_batches`.

    Its whole state is the number of the next batch: a batch is a function of (seed, number). So a
    run continues with the very next batch, even with another number of threads or worker processes.
    """

    def __init__(
        self,
        batches: grain.MapDataset,
        source: Source,
        num_threads: int,
        num_workers: int,
        num_shapes: int = 1,
    ):
        self.num_shapes = num_shapes  # of the images; a step is compiled for each
        self._batches = batches
        self._source = source
        self._num_threads = num_threads
        self._num_workers = num_workers
        self._next = 0
        self._iterator: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        try:
            batch = self._read()
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise UserError(
                "a worker process was killed, perhaps since memory was short: give fewer "
                "--num-workers; the same command resumes from the last checkpoint"
            ) from error
        self._next += 1
        return batch

    def _read(self) -> Batch:
        if self._iterator is None:
            # Grain starts the workers with the first batch.
            with _without_ctrl_c() if self._num_workers else contextlib.nullcontext():
                self._iterator = self._start()
                return next(self._iterator)
        return next(self._iterator)

    @functools.cached_property
    def example(self) -> Batch:
        """The very first batch, at any position: for shapes and initialisation."""
        batch = self._batches[0]
        assert batch is not None  # Grain's type allows for filters; there are none
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns the position as JSON values, to be saved with the model."""
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Sets the position; the next batch is the one that followed `get_state`."""
        self.close()
        self._next = state["next_batch"]

    def names(self, index: np.ndarray) -> list[str]:
        """Returns the names of a batch's images, for messages; reads the images again."""
        return [self._source[int(i)]["name"] for i in index]

    def close(self) -> None:
        """Stops threads and worker processes; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def _start(self) -> grain.DatasetIterator:
        dataset = self._batches[self._next :].to_iter_dataset(_read_options(self._num_threads))
        if self._num_workers:
            # Grain's worker processes read absl flags; a script without absl does not parse them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(self._num_workers)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_begin_worker)
        return iter(dataset)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Defers Ctrl-C; processes that start meanwhile never get it.

    A terminal sends Ctrl-C to all processes. The training handles it, and ends its workers itself.
    """
    # Python's tracker of shared memory removes what Grain leaves there at the end, and would warn.
    # It starts here already, since its start would end the blocking.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        sys.warnoptions.pop()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _begin_worker(index: int, count: int) -> None:
    """Lets a worker end with the training, and not before it."""
    del index, count
    training = multiprocessing.parent_process()
    if training is None:
        return

    def end_with_training() -> None:
        training.join()  # also after a kill
        os._exit(1)

    threading.Thread(target=end_with_training, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster sends it to all processes


def train_batches(
    source: Source,
    transforms: Sequence[Transform],
    batch_size: int,
    seed: int,
    *,
    num_threads: int = 2,
    num_workers: int = 0,
    shape_of: Callable[[Size], Size] | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> TrainBatches:
    """Returns endless shuffled batches; each epoch has another order.

    The example at a position of the training order, random transforms included, is a function of
    (seed, position) alone. Several JAX processes take neighbouring blocks of one common order.

    Args:
      source: the split.
      transforms: applied in turn to each example; the results are float32 images of one size.
      batch_size: number of examples in a batch of this process.
      seed: of the order and of the transforms.
      num_threads: number of threads that read and transform.
      num_workers: number of worker processes, each with `num_threads` threads; 0 works in this
        process. Scripts that use workers need the usual ``if __name__ == "__main__"``.
      shape_of: the largest size (height, width) that the transforms give an image of a size. Images
        are then padded to at most four shapes; each batch, in all processes, has one of them, and
        shapes take turns by the number of their images. None: the transforms give one size.
      process_index: the share of the order that this process takes; default: `jax.process_index`.
      process_count: number of shares; default: `jax.process_count`.

    Raises:
      UserError: when a batch is read: its images differ in size.
      ValueError: when the first batch is read: images are not normalised.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count

    def batches_of(part: Any, *last: Transform) -> grain.MapDataset:
        batches = (
            grain.MapDataset.source(part)
            .seed(seed)
            .shuffle()
            .repeat(_ENDLESS)
            .random_map(_Chain((*transforms, *last)))
            .batch(batch_size, batch_fn=_collect)
        )
        return batches[index::count]

    if shape_of is None:
        batches, num_shapes = batches_of(_Indexed(source)), 1
    else:
        groups = _by_shape([shape_of(source.size(i)) for i in range(len(source))])
        parts = [batches_of(Part(_Indexed(source), own), _PadTo(s)) for s, own in groups.items()]
        batches = grain.MapDataset.mix(parts, [len(own) for own in groups.values()])
        num_shapes = len(groups)
    return TrainBatches(batches, source, num_threads, num_workers, num_shapes)


def _by_shape(sizes: Sequence[Size]) -> dict[Size, list[int]]:
    """Returns the indices of the images of each of at most four shapes, the most frequent first."""
    shapes = padded_shapes(sizes, "buckets")
    groups: dict[Size, list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(shapes[size], []).append(i)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def eval_batches(
    source: Source,
    transforms: Sequence[Transform],
    batch_size: int,
    *,
    shapes: Shapes = "exact",
    padded_side: Callable[[int], int] = lambda side: side,
    devices: int = 1,
    num_threads: int = 2,
    process_index: int | None = None,
    process_count: int | None = None,
) -> "EvalBatches":
    """Returns batches with every image once, each batch of one shape, never resized.

    Images are padded at the bottom and on the right with zeros, labels with ignored pixels. The
    last batch of each shape is filled with rows of ``valid=False``; a shape of fewer images than a
    batch has smaller batches. All JAX processes get the same number of batches of the same shapes.
    Each iteration starts again.

    Args:
      source: the split.
      transforms: deterministic transforms; usually only `Normalise`.
      batch_size: largest number of examples in a batch of this process.
      shapes: the shapes of the images; see `padded_shapes`.
      padded_side: the side to which the network pads a side of an image.
      devices: batches are a multiple of this; a divisor of `batch_size`.
      num_threads: number of threads that read.
      process_index: the share of each batch that this process takes; default: `jax.process_index`.
      process_count: number of shares; default: `jax.process_count`.
    """
    process = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    sizes = [source.size(i) for i in range(len(source))]
    for transform in transforms:
        if isinstance(transform, Resize | ResizeBy):
            sizes = [transform.size_of(size) for size in sizes]
    shape_of = padded_shapes(sizes, shapes, padded_side)
    groups: dict[Size, list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(shape_of[size], []).append(i)
    plan = []
    for shape, members in sorted(groups.items()):
        share = -(-len(members) // (count * devices)) * devices
        rows = min(batch_size, share)
        for start in range(0, len(members), rows * count):
            mine = members[start + rows * process :][:rows]
            plan.append((shape, rows, mine))
    load = _LoadPadded(_Indexed(source), _Chain(tuple(transforms)))
    return EvalBatches(grain.MapDataset.source(plan).map(load), num_threads, shape_of)


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """The result of `eval_batches`: a sized iterable; each iteration starts again."""

    batches: grain.MapDataset
    num_threads: int
    shapes: dict[Size, Size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        options = _read_options(self.num_threads)
        with contextlib.closing(iter(self.batches.to_iter_dataset(options))) as iterator:
            yield from iterator


def _read_options(num_threads: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2, num_threads))


# The parts below are small classes and not closures, because worker processes pickle them.


@dataclasses.dataclass(frozen=True)
class _Indexed:
    """A source whose examples carry their index."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return {**self.source[index], "index": index}

    def size(self, index: int) -> Size:
        return self.source.size(index)


@dataclasses.dataclass(frozen=True)
class _Chain:
    """All transforms as one, called with the random generator of a position of the order."""

    transforms: tuple[Transform, ...]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        for transform in self.transforms:
            example = transform(example, rng)
        if example["image"].dtype != np.float32:
            raise ValueError("a batch needs float32 images: put Normalise among the transforms")
        return example


@dataclasses.dataclass(frozen=True)
class _PadTo:
    """Pads an example to a shape and adds its "size" before that."""

    shape: Size

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        size = np.array(example["image"].shape[:2], np.int32)
        return {**pad(example, self.shape), "size": size}


@dataclasses.dataclass(frozen=True)
class _LoadPadded:
    """Turns (shape, number of rows, indices) into an evaluation batch."""

    source: _Indexed
    chain: _Chain

    def __call__(self, item: tuple[Size, int, list[int]]) -> Batch:
        shape, num_rows, indices = item
        blank = {
            "image": np.zeros((*shape, _channels(self.chain.transforms)), np.float32),
            "label": np.full(shape, IGNORE_LABEL, np.uint8),
            "index": -1,
        }
        rows, sizes = [], np.zeros((num_rows, 2), np.int32)
        for row, index in enumerate(indices):
            example = self.chain(self.source[index], np.random.default_rng(index))
            sizes[row] = example["label"].shape
            rows.append(pad({key: example[key] for key in blank}, shape))
        return {**_collect(rows + [blank] * (num_rows - len(rows))), "size": sizes}


def _channels(transforms: Sequence[Transform]) -> int:
    return next(num_channels(t.name) for t in transforms if isinstance(t, Normalise))


def _collect(examples: Sequence[Example]) -> Batch:
    """Stacks examples into a batch."""
    sizes = {example["image"].shape[:2] for example in examples}
    if len(sizes) > 1:
        shown = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise UserError(
            f"the images of a batch differ in size (height x width {shown}): "
            "crop them to one with --crop HEIGHT WIDTH"
        )
    index = np.array([example["index"] for example in examples], np.int32)
    extra = [{k: x for k, x in example.items() if k not in _OWN} for example in examples]
    return jax.tree.map(lambda *arrays: _stack(arrays), *extra) | {
        "images": _stack([example["image"] for example in examples]),
        "labels": np.stack([example["label"] for example in examples]).astype(np.int32),
        "valid": index >= 0,
        "index": index,
    }


def _stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks arrays in C order, which Grain needs to hand them over in shared memory."""
    first = arrays[0]
    return np.stack(arrays, out=np.empty((len(arrays), *first.shape), first.dtype))
