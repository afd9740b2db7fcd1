"""PASCAL VOC 2012 and SBD with a mask for each object, from SBD's ``inst`` and VOC."""

import functools

from dense_jax.data.datasets import voc2012

find = functools.partial(voc2012.find, sbd=True, objects=True)
load = functools.partial(voc2012.load, sbd=True, objects=True)
