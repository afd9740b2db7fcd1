"""PASCAL VOC 2012 with a mask for each object, from ``SegmentationObject``."""

import functools

from dense_jax.data.datasets import voc2012

find = functools.partial(voc2012.find, objects=True)
load = functools.partial(voc2012.load, objects=True)
