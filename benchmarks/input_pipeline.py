"""Images a second of the training pipeline alone.

    python -m benchmarks.input_pipeline --data-dir=/data/camvid
    python -m benchmarks.input_pipeline --dataset-name=shapes

CamVid at 360x480: random scale, normalisation, crop and flip, batches of eight. Compare with the
images a second that the training step prints (benchmarks.train_step): the input should feed at
least twice that.
"""

import time

import tyro

from dense_jax.data import dataset, pipeline
from dense_jax.data.normalise import Normalise
from dense_jax.data.transforms import RandomCrop, RandomFlip, RandomScale


def main(
    dataset_name: str = "camvid",
    data_dir: str | None = None,
    batch_size: int = 8,
    seconds: float = 5.0,
) -> None:
    """Prints images a second by number of threads and worker processes.

    Args:
      dataset_name: a dataset, by name.
      data_dir: the folder with its files.
      batch_size: images a batch.
      seconds: how long each setting is timed.
    """
    source = dataset.load(dataset_name, data_dir).split("train")
    size = source.size(0)
    transforms = [RandomScale(0.75, 1.5), Normalise(), RandomCrop(size), RandomFlip()]
    print(f"{dataset_name} {size[0]}x{size[1]}, batch {batch_size}")
    for num_threads, num_workers in ((1, 0), (2, 0), (4, 0), (1, 1), (1, 2)):
        batches = pipeline.train_batches(
            source,
            transforms,
            batch_size,
            seed=0,
            num_threads=num_threads,
            num_workers=num_workers,
        )
        next(batches)  # starts threads and processes
        start, images = time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            images += len(next(batches)["images"])
        rate = images / (time.perf_counter() - start)
        batches.close()
        print(f"  {num_threads} threads, {num_workers} workers: {rate:6.0f} images/s")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.input_pipeline")
