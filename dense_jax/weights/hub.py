"""Weight files from the Hugging Face Hub, kept in the cache that its own tools use.

Reference: huggingface.co/docs/huggingface_hub, "Download files from the Hub" and "Understand
caching". HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT have their usual meaning.
"""

import pathlib
import re

from dense_jax.errors import UserError

_NAME = re.compile(r"(?P<repo>[^/:@]+/[^/:@]+)(?:@(?P<revision>[^:]+))?(?::(?P<file>.+))?")
_FILE = "model.safetensors"  # as timm and transformers name it


def download(name: str) -> pathlib.Path:
    """Returns a file of the Hub on this machine; it is downloaded the first time.

    Args:
      name: OWNER/REPOSITORY[@REVISION][:FILE]; the file is model.safetensors unless it is given.

    Raises:
      UserError: the name is not of this form, there is no such file, it can not be reached, or
        huggingface_hub is not installed.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(f"hub:{name}: give hub:OWNER/REPOSITORY[@REVISION][:FILE]")
    try:
        import huggingface_hub
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise UserError(f"hub:{name} needs: pip install huggingface_hub") from error
    repo, revision, file = found.group("repo", "revision", "file")
    logging.set_verbosity_error()  # what fails is told once, below
    try:
        path = huggingface_hub.hf_hub_download(repo, file or _FILE, revision=revision)
    except Exception as error:  # theirs and those of the network have nothing else in common
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"hub:{name}: no {file or _FILE} ({reason}): check the name and the connection, or "
            "download it and give file:PATH"
        ) from error
    return pathlib.Path(path)
