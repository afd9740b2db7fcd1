"""Files of the Hub: from a cache as its tools lay it out, from a server, and from neither."""

import http.server
import logging
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from dense_jax.errors import UserError
from dense_jax.weights import hub

huggingface_hub = pytest.importorskip("huggingface_hub")

REPO, COMMIT = "timm/resnet101.tv_in1k", "f" * 40
CONTENT = save({"conv1.weight": np.arange(6, dtype=np.float32).reshape(2, 3)})


def download(name, cache, **env):
    """Runs in a process of its own: the environment is read once, at the first import."""
    code = (
        "import sys\n"
        "from dense_jax.errors import UserError\n"
        "from dense_jax.weights import hub\n"
        "try: print(hub.download(sys.argv[1]))\n"
        "except UserError as error: print('refused:', error)\n"
    )
    env = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"} | env
    done = subprocess.run(
        [sys.executable, "-c", code, name], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_cache_is_read_without_a_connection(tmp_path):
    repo = tmp_path / "models--timm--resnet101.tv_in1k"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    (repo / "blobs/abc").write_bytes(CONTENT)
    for name in ("model.safetensors", "other.safetensors"):
        (snapshot / name).symlink_to("../../blobs/abc")

    for name in (REPO, f"{REPO}@{COMMIT}"):
        path = download(name, tmp_path, HF_HUB_OFFLINE="1")
        assert path == str(snapshot / "model.safetensors")
    path = download(f"{REPO}:other.safetensors", tmp_path, HF_HUB_OFFLINE="1")
    assert pathlib.Path(path).read_bytes() == CONTENT
    for name, file in ((f"{REPO}:none.npz", "none.npz"), ("timm/none", "model.safetensors")):
        message = download(name, tmp_path, HF_HUB_OFFLINE="1")
        assert message.startswith(f"refused: hub:{name}: no {file} (")
        assert message.endswith("download it and give file:PATH")
        assert "\n" not in message


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does for one file."""

    def do_HEAD(self):
        if not self.path.endswith(f"/{REPO}/resolve/main/model.safetensors"):
            return self.send_error(404)
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"abc"')
        self.send_header("Content-Length", str(len(CONTENT)))
        return self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(CONTENT)

    def log_message(self, format, *args):
        pass


@pytest.mark.slow
def test_a_file_is_downloaded_once(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    path = download(REPO, tmp_path, HF_ENDPOINT=address)
    assert load_file(path)["conv1.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert "refused: hub:timm/none: no model.safetensors (" in download(
        "timm/none", tmp_path, HF_ENDPOINT=address
    )
    server.shutdown()
    server.server_close()
    assert download(REPO, tmp_path, HF_ENDPOINT=address) == path  # nobody answers any more


def test_what_fails_is_told_once(monkeypatch):
    def fail(*args, **options):
        logger = logging.getLogger("huggingface_hub.utils")  # warns of each of five attempts
        assert not logger.isEnabledFor(logging.WARNING)
        raise OSError("no connection\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=r"\(no connection\)"):
        hub.download(REPO)


@pytest.mark.parametrize(
    "name",
    [
        *("", "resnet101", "a/b/c", "timm/", "timm/x@", "timm/x:"),
        *("../x", "timm/..", "./x", "/etc/passwd", "timm\\..\\x/y", "timm/x\ty", "timm/x\n"),
        *("timm/x@..", "timm/x@../../main", "timm/x@/etc", "timm/x@refs//1", "timm/x@a\\b"),
        *("timm/x@v1\x1b[2J", "timm/x:../y", "timm/x:/etc/passwd", "timm/x:a/../../y", "timm/x:a/"),
        *("timm/x:a//b", "timm/x:./a", "timm/x:..\\y", "timm/x:a\0b", "timm/x@v1:../y"),
    ],
)
def test_other_names_are_refused_before_any_request(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(UserError, match="OWNER/REPOSITORY") as error:
        hub.download(name)
    assert str(error.value).isprintable()


def test_revisions_and_files_may_lie_in_folders(monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *names, **more: asked.append((names, more)) or ""
    )
    hub.download("timm/x.y@refs/pr/1:unet/a..b.safetensors")
    assert asked == [(("timm/x.y", "unet/a..b.safetensors"), {"revision": "refs/pr/1"})]


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        hub.download(REPO)
