"""Downloads weight files from the Hugging Face Hub into the cache that its own tools use.

Reference: huggingface.co/docs/huggingface_hub, "Download files from the Hub" and "Understand
caching". HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT have their usual meaning.
"""

import contextlib
import pathlib
import re

from dense_jax.errors import UserError, printable, stays_inside
from dense_jax.weights import shards

_NAME = re.compile(r"(?P<repo>[^/:@]+/[^/:@]+)(?:@(?P<revision>[^:]+))?(?::(?P<file>.+))?")
_FILE = "model.safetensors"  # as timm and transformers name it


def download(name: str) -> pathlib.Path:
    """Returns the local path of a file of the Hub; the first call downloads it.

    Args:
      name: OWNER/REPOSITORY[@REVISION][:FILE]; the default file is model.safetensors, or the index
        of its parts. With an index all parts are downloaded.

    Raises:
      UserError: the name has another form, the file does not exist, the Hub cannot be reached, or
        huggingface_hub is not installed.
    """
    found = _NAME.fullmatch(name)
    # The cache has folders of these names, and a server gets them in an address.
    if found is None or not all(stays_inside(part) for part in found.groups() if part is not None):
        raise UserError(
            f"hub:{printable(name)}: give hub:OWNER/REPOSITORY[@REVISION][:FILE], without .. and "
            "empty parts"
        )
    try:
        import huggingface_hub
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise UserError(f"hub:{name} needs: pip install huggingface_hub") from error
    repo, revision, file = found.group("repo", "revision", "file")
    logging.set_verbosity_error()  # the error below reports a failure once

    def get(file: str) -> pathlib.Path:
        try:
            return pathlib.Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        except Exception as error:  # errors of the Hub and of the network share no other class
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"hub:{name}: no {file} ({reason}): check the name and the connection, or "
                "download it and give file:PATH"
            ) from error

    path = None
    try:
        path = get(file or _FILE)
    except UserError:
        if file is not None:
            raise
        file = f"{_FILE}{shards.INDEX}"
        with contextlib.suppress(UserError):
            path = get(file)
        if path is None:
            raise
    if path.name.endswith(shards.INDEX):
        folder = (file or "").rpartition("/")[0]
        for part in shards.read_index(path):
            get(f"{folder}/{part}" if folder else part)
    return path
