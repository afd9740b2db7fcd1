"""CNNs for dense image labeling in JAX and Flax."""

from typing import Any

__version__ = "0.1.0"


def load(workdir: Any, checkpoint: str = "last", *, task: Any = None) -> Any:
    """Opens a run folder: ``load("runs/fcn-demo").predict("photo.jpg").labels``.

    See `dense_jax.tasks.trained.load`. The first call imports that module.
    """
    from dense_jax.tasks import trained

    return trained.load(workdir, checkpoint, task=task)
