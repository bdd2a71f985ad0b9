"""The command line: text, options, exit codes, Ctrl-C and closed pipes, on a small random model."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from text_models import tiny_model

from bitnet_ops import __version__, from_pretrained, isa
from bitnet_ops.cli import main as cli
from bitnet_ops.cli import options as cli_options
from bitnet_ops.cli.main import commands
from bitnet_ops.generation import loop as decoding
from bitnet_ops.generation.drafts import PromptLookup

PROGRAM = [sys.executable, "-m", "bitnet_ops"]

LONG_CONTEXT = 1_000_000
"""Far more tokens than the tiny model writes before a test interrupts it."""

PATIENCE = 60
"""Seconds after which a subprocess counts as hung; it needs about three to start, more on a busy machine."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without end tokens, so that the length of a text is known."""
    path = tmp_path_factory.mktemp("models") / "plain"
    tiny_model(eos=None).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def endless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "endless"
    tiny_model(eos=None, context=LONG_CONTEXT, chat=True).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "chat"
    tiny_model(eos=0, context=128, chat=True).save_pretrained(path)
    return path


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    """Runs a command in this process, exit codes as click gives them."""
    return CliRunner().invoke(commands, [str(argument) for argument in arguments], input=stdin)


def expected_text(folder: Path, prompt: str, **settings: object) -> str:
    return "".join(from_pretrained(folder).stream(prompt, **settings))  # type: ignore[arg-type]


# ---- generate ---------------------------------------------------------------------------------------


def test_generate_prints_prompt_and_text(folder: Path) -> None:
    result = run("generate", "--model", folder, "--max-new-tokens", 12, "It is")
    assert result.exit_code == 0
    assert result.stdout == "It is" + expected_text(folder, "It is", max_new_tokens=12) + "\n"
    assert re.fullmatch(
        r"prompt: \d+ tokens, [\d.]+ tokens/s; new: 12 tokens, [\d.]+ tokens/s\n", result.stderr
    )


def test_generate_without_echo_from_stdin(folder: Path) -> None:
    result = run("generate", "--model", folder, "--max-new-tokens", 5, "--no-echo", "-", stdin="naïve 你\n")
    assert result.exit_code == 0
    assert result.stdout == expected_text(folder, "naïve 你", max_new_tokens=5) + "\n"


def test_sampling_options_arrive(folder: Path) -> None:
    options = [
        "--temperature",
        0.7,
        "--top-k",
        9,
        "--top-p",
        0.95,
        "--min-p",
        0.01,
        "--repetition-penalty",
        1.2,
    ]
    result = run("generate", "--model", folder, "--max-new-tokens", 20, *options, "--seed", 5, "It")
    settings = dict(temperature=0.7, top_k=9, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=5)
    assert (
        result.stdout
        == "It" + expected_text(folder, "It", max_new_tokens=20, do_sample=True, **settings) + "\n"
    )


def test_cache_dtype_arrives(folder: Path) -> None:
    # The whole context, so that coarser keys and values show.
    settings = dict(max_new_tokens=250, do_sample=True, seed=0)
    options = ["--max-new-tokens", 250, "--temperature", 1, "--seed", 0, "--no-echo"]
    texts = []
    for dtype in (torch.float32, torch.int8):
        name = str(dtype).removeprefix("torch.")
        result = run("generate", "--model", folder, *options, "--cache-dtype", name, "It")
        assert (
            result.stdout_bytes.decode() == expected_text(folder, "It", cache_dtype=dtype, **settings) + "\n"
        )
        texts.append(result.stdout)
    assert texts[0] != texts[1]


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(("options", "most"), [([], 10), (["--prompt-lookup-num-tokens", 3], 3)])
def test_length_of_drafts_arrives(
    folder: Path, command: str, options: list[object], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Lookup(PromptLookup):
        def __init__(self, ids: Sequence[int], most: int) -> None:
            super().__init__(ids, most)
            asked.append(most)

    monkeypatch.setattr(decoding, "PromptLookup", Lookup)
    prompt = ["It"] if command == "generate" else []
    result = run(command, "--model", folder, "--max-new-tokens", 3, *options, *prompt, stdin="It\n")
    assert result.exit_code == 0
    assert asked == [most]


@pytest.mark.parametrize(
    "option", [("--top-k", "3"), ("--top-p", "0.5"), ("--min-p", "0.1"), ("--temperature", "2")]
)
def test_one_sampling_option_is_enough_to_sample(folder: Path, option: tuple[str, str]) -> None:
    name = option[0].removeprefix("--").replace("-", "_")
    value = json.loads(option[1])
    result = run(
        "generate", "--model", folder, "--max-new-tokens", 9, *option, "--seed", 1, "--no-echo", "It"
    )
    sampled = expected_text(folder, "It", max_new_tokens=9, do_sample=True, seed=1, **{name: value})
    assert result.stdout == sampled + "\n"


def test_temperature_zero_is_greedy_whatever_the_model_prefers(tmp_path: Path) -> None:
    model = tiny_model(eos=None)
    model.generation_config = {"do_sample": True, "temperature": 1.5}
    model.save_pretrained(tmp_path / "m")
    greedy = run(
        "generate", "--model", tmp_path / "m", "--max-new-tokens", 9, "--temperature", 0, "It"
    ).stdout
    assert greedy == "It" + expected_text(tmp_path / "m", "It", max_new_tokens=9, do_sample=False) + "\n"
    sampled = run("generate", "--model", tmp_path / "m", "--max-new-tokens", 9, "--seed", 2, "It").stdout
    assert sampled == "It" + expected_text(tmp_path / "m", "It", max_new_tokens=9, seed=2) + "\n" != greedy


def test_stop_strings_are_cut_out(folder: Path) -> None:
    whole = expected_text(folder, "It", max_new_tokens=30, do_sample=True, seed=3)
    stop = next(character for character in whole[5:] if character.isascii())
    options = [
        "--temperature",
        1,
        "--seed",
        3,
        "--stop",
        "never this",
        "--stop",
        stop,
        "--max-new-tokens",
        30,
    ]
    result = run("generate", "--model", folder, "--no-echo", *options, "It")
    assert result.stdout == whole[: whole.index(stop)] + "\n"


def test_default_length_ends_with_the_context(folder: Path) -> None:
    result = run("generate", "--model", folder, "a" * 100)
    assert result.exit_code == 0
    prompt, new = map(int, re.findall(r"(\d+) tokens,", result.stderr))
    assert prompt + new == 256
    assert new < cli.DEFAULT_NEW_TOKENS


def test_threads(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert run("generate", "--model", folder, "--max-new-tokens", 1, "--threads", 1, "It").exit_code == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# ---- chat -------------------------------------------------------------------------------------------


def test_chat_from_a_pipe(chat_folder: Path) -> None:
    options = ["--model", chat_folder, "--max-new-tokens", 6, "--system", "Be brief."]
    result = run("chat", *options, stdin="Hello\n\nAnd you?\n/clear\nHello\n/exit\nnot read\n")
    assert result.exit_code == 0
    from bitnet_ops.generation.chat import ChatSession

    session = ChatSession(from_pretrained(chat_folder), "Be brief.")
    first, second = ("".join(session.reply(text, max_new_tokens=6)) for text in ("Hello", "And you?"))
    # Bytes, because click shows a carriage return before the end of a line as none.
    assert result.stdout_bytes.decode() == f"{first}\n{second}\n{first}\n"
    assert result.stderr == ""


def test_chat_without_template_explains_itself(folder: Path) -> None:
    result = run("chat", "--model", folder, "--max-new-tokens", 6, stdin="It is a truth\n")
    assert result.exit_code == 0
    assert result.stdout == expected_text(folder, "It is a truth", max_new_tokens=6) + "\n"
    assert result.stderr == "This model has no chat template: it continues the text that you begin.\n"
    result = run("chat", "--model", folder, "--system", "Be brief.", stdin="")
    assert result.exit_code == 2
    assert "--system: this model has no chat template" in result.stderr


def test_chat_that_outgrows_the_context(chat_folder: Path) -> None:
    result = run("chat", "--model", chat_folder, stdin="word " * 300 + "\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: conversation: expected fewer than 128 tokens (the context), got")


# ---- info, help, versions ---------------------------------------------------------------------------


def test_info(folder: Path) -> None:
    result = run("info", "--model", folder)
    assert result.exit_code == 0
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in result.stdout.splitlines())
    model = tiny_model()
    config = model.config
    ternary = config.num_hidden_layers * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80)
    norms = config.num_hidden_layers * (3 * 48 + 80) + 48
    assert facts["bitnet-ops"] == __version__
    assert facts["instruction set"].startswith(f"{isa()} (supported here: ")
    assert facts["parameters"] == f"{ternary + norms + 405 * 48:,}, of these ternary {ternary:,}"
    assert facts["context"] == "256 tokens"
    assert facts["vocabulary"] == "405 tokens; end of text: none"
    assert facts["chat template"] == "no"
    assert facts["heads"] == "4 query, 2 key and value, size 12"


def test_info_without_any_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (cli, cli_options):
        monkeypatch.setattr(module, "DEFAULT_MODEL", tmp_path / "none")
    result = run("info")
    assert result.exit_code == 0
    assert "none: the package came without one" in result.stdout
    result = run("generate", "It")
    assert result.exit_code == 1
    assert result.stderr == "Error: this installation has no default model; name one with --model\n"


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["info"], ["train"]])
def test_help_teaches_with_examples(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Examples:\n" in result.stdout
    assert f"  bitnet-ops {' '.join(command)}" in result.stdout
    assert "\b" not in result.stdout


# ---- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "Missing argument 'PROMPT'"),
        (["generate", "It", "--max-new-tokens", "0"], "'--max-new-tokens'"),
        (["generate", "It", "--temperature", "-1"], "'--temperature'"),
        (["generate", "It", "--top-p", "2"], "'--top-p'"),
        (
            ["generate", "It", "--temperature", "0", "--top-k", "4"],
            "--top-k has no effect with --temperature 0",
        ),
        (["generate", "It", "--stop", ""], "--stop: expected a text"),
        (["generate", "It", "--threads", "0"], "'--threads'"),
        (["generate", "It", "--shout"], "No such option"),
        (["sing"], "No such command 'sing'"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_errors_are_one_line_and_exit_code_1(folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["--model", tmp_path, "It"], "config.json"),
        (["--model", "/no/such/folder", "It"], "'/no/such/folder', which does not exist"),
        (["--model", folder, "--max-new-tokens", 1000, "It"], "max_position_embeddings = 256, got 1 + 1000"),
        (["--model", folder, "a" * 1000], "max_position_embeddings = 256"),
        (["--model", folder, "caf\udce9"], "prompt: expected text that UTF-8 can encode"),
    ):
        result = run("generate", *arguments)
        assert result.exit_code == 1, result.output
        assert message in result.stderr
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""
    result = run("generate", "--model", folder, "-", stdin=b"\xff\xfe")
    assert result.exit_code == 1
    assert "can't decode byte 0xff" in result.stderr


# ---- the process: exit codes, signals, pipes --------------------------------------------------------


def start(*arguments: object, **named: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **named,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize(
    ("arguments", "code", "stream", "text"),
    [
        (["generate", "--model", ".", "It"], 1, "stderr", "config.json"),
        # A process takes seconds to start, and the tests above get these codes without one.
        pytest.param(
            ["--version"], 0, "stdout", f"bitnet-ops, version {__version__}\n", marks=pytest.mark.slow
        ),
        pytest.param(["generate"], 2, "stderr", "Missing argument 'PROMPT'", marks=pytest.mark.slow),
    ],
)
def test_exit_codes(arguments: list[str], code: int, stream: str, text: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE, check=False
    )
    assert done.returncode == code
    assert text in getattr(done, stream)
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_a_text_cleanly(endless_folder: Path) -> None:
    process = start("generate", "--model", endless_folder, "--max-new-tokens", LONG_CONTEXT - 100, "It")
    assert process.stdout is not None
    assert process.stderr is not None
    begin = process.stdout.read(4)  # the prompt, and the first of the text: it appears while it is written
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert begin.startswith(b"It")
    assert rest.endswith(b"\n"), "the terminal's prompt stands on a line of its own"
    assert errors == b""


def test_closed_pipe_ends_the_program_quietly(endless_folder: Path) -> None:
    process = start("generate", "--model", endless_folder, "--max-new-tokens", LONG_CONTEXT - 100, "It")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(4)
    process.stdout.close()  # as `| head -c 4` does
    errors = process.stderr.read()
    assert process.wait(timeout=PATIENCE) == -signal.SIGPIPE
    assert errors == b""


def read_until(terminal: int, text: bytes) -> bytes:
    """Reads from a terminal until ``text`` has come."""
    seen = b""
    deadline = time.monotonic() + PATIENCE
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {text!r} in {seen!r}"
        seen += os.read(terminal, 4096)
    return seen


def test_chat_on_a_terminal(endless_folder: Path) -> None:
    """Ctrl-C breaks off an answer, and at the prompt the program; nothing of Python's shows."""
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "chat", "--model", str(endless_folder)],
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        start_new_session=True,
    )
    os.close(other_end)
    try:
        seen = read_until(terminal, b"> ")
        os.write(terminal, b"Hello\n")
        seen += read_until(terminal, b"Hello\r\n")
        seen += os.read(terminal, 1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        seen += read_until(terminal, b"> ")
        os.write(terminal, b"/clear\n")
        seen += read_until(terminal, b"> ")
        # Python's line editor sleeps over a signal that comes just between its prompt and its waiting, until
        # the next key; so, like a person, try again.
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert process.returncode == 130
        assert b"Traceback" not in seen
        assert b"Ctrl-C breaks off an answer" in seen
    finally:
        process.kill()
        os.close(terminal)


def test_letters_that_the_output_does_not_have() -> None:
    """Code pages of Windows have few; PYTHONIOENCODING gives one to any system."""
    done = subprocess.run(
        [*PROGRAM, "generate", "--max-new-tokens", "1", "\u4e2d x"],
        capture_output=True,
        timeout=PATIENCE,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"? x")
