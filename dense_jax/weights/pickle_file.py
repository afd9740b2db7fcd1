"""Reads pickles of NumPy arrays by name: the `.pkl` files of Detectron and detectron2.

Detectron's are of Python 2, where the bytes of arrays are text. Both put the arrays into a
container, "blobs" or "model", and ImageNet's files have none. An interpreter of our own maps the
arrays and runs nothing; see `dense_jax.weights.pickles`.

Reference: facebookresearch/Detectron: detectron/utils/net.py, `save_model_to_weights_file`;
facebookresearch/detectron2: detectron2/checkpoint/detection_checkpoint.py.
"""

from dense_jax.weights.torch_file import read_arrays as read_tensors

__all__ = ["read_tensors"]
