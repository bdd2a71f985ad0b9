"""The command ``bitnet-ops serve``: transformers' own server, with ternary models packed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import click

from .. import DEFAULT_MODEL
from ..checkpoint.location import hub_name, locate
from .errors import expected_errors
from .options import MODEL_OPTION, THREADS_OPTION

PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""For models without a chat template: the texts one after another, to be continued."""

NEEDED = ("force_model", "device", "host", "port")
"""Parameters of transformers' server that are used here."""


@click.command()
@MODEL_OPTION
@click.option(
    "--host",
    metavar="ADDRESS",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. The server has no passwords: others than the default let in everybody.",
)
@click.option(
    "--port", metavar="P", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port."
)
@THREADS_OPTION
def serve(source: str | None, host: str, port: int, threads: int | None) -> None:
    """Serve a model over HTTP, with the API of OpenAI.

    This is the server of transformers (pip install 'bitnet_ops[serve]') with `register_transformers`: chat
    and text completions, streaming, one model. A model without a chat template continues the texts of a
    conversation.

    \b
    Examples:
      bitnet-ops serve --model microsoft/bitnet-b1.58-2B-4T
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'
    """  # noqa: D301, click wants the character
    with expected_errors():
        name = served_name(source or DEFAULT_MODEL)
        server_class = their_server()
    import torch

    from .. import register_transformers

    if threads is not None:
        torch.set_num_threads(threads)
    with register_transformers():
        server_class(force_model=name, device="cpu", host=host, port=port)


def served_name(model: str | Path) -> str:
    """What transformers calls a model that --model names.

    Raises:
        ValueError: it is a GGUF file, which transformers would unpack.
    """
    name = hub_name(model) if isinstance(model, str) else None
    if name is None:
        path = locate(model)
        if path.is_file():
            raise ValueError(
                f"--model: expected a folder or a name on the Hugging Face hub, got the file {str(path)!r}; "
                f"`bitnet-ops convert {path} FOLDER` makes a folder of it"
            )
        return str(path.resolve())
    if name.file is not None:
        raise ValueError(f"--model: expected the name of a repository, got one of a file in it, {model!r}")
    return f"{name.repo}@{name.revision or 'main'}"


def their_server() -> Any:
    """The class of transformers' server; making one of it serves until Ctrl-C.

    Raises:
        ValueError: it is not installed, or has other options.
    """
    hint = "pip install 'bitnet_ops[serve]'"
    try:
        from transformers.cli import serve as theirs
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise ValueError(f"serve: expected transformers with its server ({hint}), got: {error}") from None
    if not is_serve_available():
        raise ValueError(f"serve: expected fastapi, uvicorn, pydantic and openai to be installed ({hint})")
    server_class = theirs.Serve
    missing = set(NEEDED) - set(inspect.signature(server_class.__init__).parameters)
    if missing:
        raise ValueError(
            f"serve: expected a version of transformers whose server has {', '.join(NEEDED)} ({hint}), "
            f"got one without {', '.join(sorted(missing))}"
        )
    _give_plain_template()
    return server_class


def _give_plain_template() -> None:
    """Has models without a chat template served with `PLAIN_TEMPLATE`."""
    from transformers.cli.serving import model_manager

    manager = model_manager.ModelManager
    if manager.__module__ == __name__:
        return

    class ModelManager(manager):  # type: ignore[misc, valid-type]
        def _load_processor(self, *arguments: Any, **options: Any) -> Any:
            processor = super()._load_processor(*arguments, **options)
            if getattr(processor, "chat_template", None) is None:
                processor.chat_template = PLAIN_TEMPLATE
            return processor

    model_manager.ModelManager = ModelManager
