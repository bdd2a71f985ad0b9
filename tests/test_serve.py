"""`bitnet-ops serve`: transformers' server on the default model, with OpenAI's client."""

import importlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import bitnet_ops
from bitnet_ops.cli.main import commands

command = importlib.import_module("bitnet_ops.cli.serve")  # the name is that of the command in it, too

pytest.importorskip("transformers")


def started(monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[Any, dict[str, Any]]:
    """The command's result, and what it starts transformers' server with."""
    seen: dict[str, Any] = {}

    def server(**arguments: Any) -> None:
        from transformers.quantizers import auto

        seen.update(arguments, quantizer=auto.AUTO_QUANTIZER_MAPPING["bitnet"].__module__)

    monkeypatch.setattr(command, "their_server", lambda: server)
    return CliRunner().invoke(commands, ["serve", *options]), seen


def test_what_the_server_is_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    result, seen = started(monkeypatch)
    assert result.exit_code == 0, result.output
    assert seen.pop("quantizer") == "bitnet_ops.integrations.transformers_quantizers"
    folder = str(bitnet_ops.DEFAULT_MODEL.resolve())
    assert seen == {"force_model": folder, "device": "cpu", "host": "127.0.0.1", "port": 8000}
    _, seen = started(monkeypatch, "--host", "0.0.0.0", "--port", "81", "--model", "owner/model")
    assert (seen["host"], seen["port"], seen["force_model"]) == ("0.0.0.0", 81, "owner/model@main")
    _, seen = started(monkeypatch, "--model", "owner/model@dev")
    assert seen["force_model"] == "owner/model@dev"


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("nowhere", "expected a folder with a checkpoint"),
        ("owner/model:file.gguf", "expected the name of a repository"),
    ],
)
def test_models_that_cannot_be_served(monkeypatch: pytest.MonkeyPatch, model: str, text: str) -> None:
    result, seen = started(monkeypatch, "--model", model)
    assert result.exit_code == 1
    assert text in result.output
    assert not seen


def test_a_gguf_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    result, _ = started(monkeypatch, "--model", str(tmp_path / "model.gguf"))
    assert "bitnet-ops convert" in result.output


def test_without_the_servers_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    result = CliRunner().invoke(commands, ["serve"])
    assert result.exit_code == 1
    assert "pip install 'bitnet_ops[serve]'" in result.output


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a server on the default model, on a free port."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "bitnet_ops", "serve", "--port", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path_factory.mktemp("server"))  # not where the source is
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.5)
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    finally:
        process.terminate()
        process.wait(timeout=60)


MODEL = str(bitnet_ops.DEFAULT_MODEL.resolve())
PROMPT = "the next morning"


def ask(client: Any, prompt: str = PROMPT, **options: Any) -> Any:
    options = {"max_tokens": 6, "temperature": 0, **options}
    return client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": prompt}], **options
    )


def expected(prompt: str, tokens: int = 6) -> str:
    """What our own model writes. Its best tokens lead clearly: see tests/test_accelerate.py."""
    model = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    inputs = model.encode(prompt)
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
    return model.tokenizer.decode(ids[inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.slow
def test_chat(client: Any) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content.strip() == expected(PROMPT).strip()
    assert answer.usage.completion_tokens == 6


@pytest.mark.slow
def test_streaming(client: Any) -> None:
    chunks = list(ask(client, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(chunks) > 3
    assert text.strip() == expected(PROMPT).strip()


@pytest.mark.slow
def test_two_clients_at_once(client: Any) -> None:
    prompts = [PROMPT, "on the other"]
    alone = [ask(client, prompt).choices[0].message.content for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda prompt: ask(client, prompt), prompts))
    assert [answer.choices[0].message.content for answer in answers] == alone


@pytest.mark.slow
def test_a_cancelled_request(client: Any) -> None:
    """The next one is answered, and long before the cancelled one would have been done.

    The server answers one request after the other: behind one that nobody cancels, the next has to wait.
    """
    text = expected(PROMPT).strip()

    def seconds() -> float:
        begin = time.perf_counter()
        assert ask(client).choices[0].message.content.strip() == text
        return time.perf_counter() - begin

    with ask(client, stream=True, max_tokens=900) as stream:
        next(iter(stream))
        behind_it = seconds()
    with ask(client, stream=True, max_tokens=900) as stream:
        next(iter(stream))
    assert seconds() < behind_it / 4


@pytest.mark.slow
def test_bad_requests(client: Any) -> None:
    import openai

    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(model="another", messages=[{"role": "user", "content": "x"}])
    assert 400 <= error.value.status_code < 500
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, extra_body={"no_such_field": 1})
    assert 400 <= error.value.status_code < 500
    assert ask(client).choices[0].message.content
