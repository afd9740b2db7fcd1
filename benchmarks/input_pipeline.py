"""Measures the images per second of the training pipeline alone.

    python -m benchmarks.input_pipeline --data-dir=/data/camvid
    python -m benchmarks.input_pipeline --dataset-name=shapes

By default: CamVid at 360x480, with random scale, normalisation, crop and flip, in batches of eight.
The pipeline should be at least twice as fast as the training step (benchmarks.train_step).
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
    """Prints images per second by number of threads and worker processes.

    Args:
      dataset_name: name of the dataset.
      data_dir: folder of the dataset.
      batch_size: images in each batch.
      seconds: duration of each measurement.
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
