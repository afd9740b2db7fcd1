"""PASCAL VOC 2012 with the training labels of SBD, "trainaug": 10,582 training images."""

import functools

from dense_jax.data.datasets import voc2012

find = functools.partial(voc2012.find, sbd=True)
load = functools.partial(voc2012.load, sbd=True)
