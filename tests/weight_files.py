"""What tests of weight files share, and files of PyTorch written by hand.

Of those: the steps of a pickle as bytes, and both forms around it.
"""

import io
import pickle
import zipfile

import numpy as np
import pytest

from dense_jax.errors import UserError
from dense_jax.weights import files

MAGIC = 0x1950A86A20F9469CFC6C
KERNEL = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2) / 8 - 1
# Storages of a file of PyTorch, by key.
STORAGES = {"7": KERNEL.ravel(), "8": np.array([5, -6, 7])}


def refused(path):
    """Returns what is said when all of a file is read."""
    with pytest.raises(UserError) as error:
        dict(files.read(path).tensors)
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()
    return str(error.value)


def same(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def write(path, content):
    path.write_bytes(content)
    return path


def text(value):
    value = value.encode()
    return b"X" + len(value).to_bytes(4, "little") + value


def integer(value):
    return b"J" + value.to_bytes(4, "little", signed=True)


def row(*items):
    return b"(" + b"".join(items) + b"t"


def integers(values):
    return row(*map(integer, values))


def items(**values):
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def storage(key, kind, *view):
    where = (text("storage"), name("torch", f"{kind}Storage"), text(key), text("cuda:0"))
    return row(*where, integer(9), *view) + b"Q"


def tensor(key, offset, shape, strides, kind="Float", view=()):
    what = (storage(key, kind, *view), integer(offset), integers(shape), integers(strides))
    hooks = name("collections", "OrderedDict") + b")R"
    return name("torch._utils", "_rebuild_tensor_v2") + row(*what, b"\x89", hooks) + b"R"


WHOLE = tensor("7", 0, (2, 3, 2, 2), (12, 4, 2, 1))


def zip_form(content, storages=STORAGES, **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02" + content + b".")
        for key, values in storages.items():
            archive.writestr(f"net/data/{key}", values.tobytes())
        for member, value in members.items():
            archive.writestr(f"net/{member}", value)
    return file.getvalue()


def old_form(content, storages=STORAGES, little_endian=True):
    head = [pickle.dumps(value, 2) for value in (MAGIC, 1001, {"little_endian": little_endian})]
    storages = {key: values for key, values in storages.items() if text(key) in content}
    body = [b"\x80\x02" + content + b".", pickle.dumps(list(storages), 2)]
    raw = [values.size.to_bytes(8, "little") + values.tobytes() for values in storages.values()]
    return b"".join(head + body + raw)
