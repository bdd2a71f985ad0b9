"""Names on the Hugging Face hub, against a small server that speaks its protocol on this machine."""

import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlparse

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from tiny_checkpoints import tiny_folder

from bitnet_ops import CheckpointError, from_pretrained
from bitnet_ops.checkpoint import hub
from bitnet_ops.checkpoint.location import HubName, hub_name, locate
from bitnet_ops.cli.main import commands

REPO = "tiny/bitnet"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The parts of the protocol that a download needs, for one repository with the revisions main and v2."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(path)
        for name, content in self.files.items():
            if path in (f"/{REPO}/resolve/{revision}/{name}" for revision in ("main", "v2", COMMIT)):
                return self.send(200, content, body)
        base = f"/api/models/{REPO}"
        if path in (base, *(f"{base}/revision/{revision}" for revision in ("main", "v2", COMMIT))):
            siblings = [{"rfilename": name} for name in self.files]
            return self.json(200, {"id": REPO, "sha": COMMIT, "siblings": siblings}, body)
        if path.startswith(f"{base}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                for name, content in self.files.items()
            ]
            return self.json(200, tree, body)
        if REPO not in path:
            code = "RepoNotFound"
        else:
            code = "RevisionNotFound" if "none/" in f"{path}/" else "EntryNotFound"
        return self.send(404, b"{}", body, {"X-Error-Code": code})

    def json(self, status: int, value: Any, body: bool) -> None:
        self.send(status, json.dumps(value).encode(), body)

    def send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{digest(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def point_to(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """As HF_ENDPOINT and HF_HOME do, which are read when the library is imported."""
    api = huggingface_hub.HfApi(endpoint=endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    download = partial(huggingface_hub.snapshot_download, endpoint=endpoint, cache_dir=str(cache))
    monkeypatch.setattr(hub, "snapshot_download", download)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub with one repository of a tiny model; gives the folder that it was made from."""
    folder = tiny_folder(tmp_path / "made")
    monkeypatch.setattr(Hub, "files", {file.name: file.read_bytes() for file in folder.iterdir()})
    Hub.files |= {
        "README.md": b"# tiny",
        "pytorch_model.bin": b"other weights",
        "onnx/model.safetensors": b"x",
    }
    Hub.asked.clear()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    point_to(monkeypatch, f"http://127.0.0.1:{httpd.server_address[1]}", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    yield folder
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")  # nobody listens on the port "discard"
    monkeypatch.chdir(tmp_path)


def test_a_name_gives_the_model(server: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = from_pretrained(REPO)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids), from_pretrained(server)(ids))
    assert f"{REPO}: revision {COMMIT}, " in capfd.readouterr().err


def test_only_the_files_that_are_needed_are_fetched(server: Path) -> None:
    path = locate(REPO)
    assert {file.name for file in path.rglob("*") if file.is_file()} == {"config.json", "model.safetensors"}
    assert not any("resolve" in path and ("README" in path or "bin" in path) for path in Hub.asked)


def test_a_second_time_nothing_is_fetched(server: Path) -> None:
    first = locate(REPO)
    Hub.asked.clear()
    assert locate(REPO) == first
    assert not any("/resolve/" in path for path in Hub.asked)


def test_the_cache_serves_without_a_network(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = locate(REPO)
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert locate(REPO) == first


def test_a_revision(server: Path) -> None:
    assert locate(f"{REPO}@v2") == locate(REPO, revision="v2") == locate(REPO)
    assert any("v2" in path for path in Hub.asked)


def test_a_gguf_file_of_a_repository(server: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Hub.files["q/model-i2_s.gguf"] = b"GGUF and more"
    path = locate(f"{REPO}:q/model-i2_s.gguf")
    assert path.name == "model-i2_s.gguf"
    assert path.read_bytes() == b"GGUF and more"
    assert f"{REPO}: revision {COMMIT}, " in capfd.readouterr().err
    assert not any("safetensors" in path for path in Hub.asked if "/resolve/" in path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny/none", ("tiny/none", "no such repository")),
        (f"{REPO}@none", ("revision", "'none'")),
        (f"{REPO}:none.gguf", ("none.gguf", f"its GGUF files are {REPO}:a.gguf")),
    ],
)
def test_what_is_not_on_the_hub(server: Path, name: str, words: tuple[str, ...]) -> None:
    Hub.files["a.gguf"] = b"GGUF"
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(name)
    for word in words:
        assert word in str(caught.value)


def test_a_repository_of_gguf_files_says_which(server: Path) -> None:
    del Hub.files["model.safetensors"]
    Hub.files["a.gguf"] = b"GGUF"
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors.*got none; its GGUF files are {REPO}:a\.gguf"
    ):
        from_pretrained(REPO)


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_error_says_what_to_fetch_by_hand() -> None:
    with pytest.raises(CheckpointError) as caught:
        from_pretrained("microsoft/bitnet-b1.58-2B-4T")
    text = str(caught.value)
    assert "\n" not in text
    for word in ("*.json", "hf download microsoft/bitnet-b1.58-2B-4T '*.safetensors'"):
        assert word in text
    assert "into a folder 'bitnet-b1.58-2B-4T'; then pass 'bitnet-b1.58-2B-4T'" in text


@pytest.mark.usefixtures("no_network")
def test_without_a_network_a_gguf_file() -> None:
    with pytest.raises(CheckpointError, match=r"fetch m/x\.gguf from .* then pass 'b/m/x\.gguf'"):
        from_pretrained("a/b:m/x.gguf")


def test_offline_nothing_is_asked(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"tiny/bitnet: expected it in the cache .*HF_HUB_OFFLINE"):
        from_pretrained(REPO)
    assert not Hub.asked


@pytest.mark.usefixtures("no_network")
def test_on_the_command_line() -> None:
    result = CliRunner().invoke(commands, ["generate", "--model", "a/b", "It"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: a/b: expected it in the cache")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b", HubName("a/b", None, None)),
        ("a-1/b.2_c", HubName("a-1/b.2_c", None, None)),
        ("a/b@v1.0", HubName("a/b", "v1.0", None)),
        ("a/b@refs/pr/1", HubName("a/b", "refs/pr/1", None)),
        ("a/b:c.gguf", HubName("a/b", None, "c.gguf")),
        ("a/b@main:d/c.gguf", HubName("a/b", "main", "d/c.gguf")),
        *(
            (text, None)
            for text in (
                "a",
                "a/b/c",
                "./a",
                "../a",
                "/a/b",
                "~/a",
                "a/",
                "a/b:c.bin",
                "a/b.gguf",
                "a/b:",
                "",
                ".a/b",
            )
        ),
    ],
)
def test_names(text: str, name: HubName | None) -> None:
    assert hub_name(text) == name


def test_a_path_that_is_not_there_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for model in ("models/bitnet", Path("a/b"), tmp_path / "none"):
        with pytest.raises(CheckpointError, match="does not exist"):
            from_pretrained(model)
    with pytest.raises(CheckpointError, match="revision: expected None"):
        from_pretrained(tmp_path, revision="main")
