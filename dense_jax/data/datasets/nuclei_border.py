"""The nuclei with a third class, the border between touching nuclei; see `nuclei`."""

import functools

from dense_jax.data.datasets import nuclei

find = functools.partial(nuclei.find, target="border")
load = functools.partial(nuclei.load, target="border")
