"""The command line: ``bitnet-ops``, also ``python -m bitnet_ops``.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 broken off with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import click

from .. import DEFAULT_MODEL
from .convert import convert
from .embed import embed
from .errors import expected_errors
from .evaluate import evaluate
from .options import ACTIVATION_BITS_OPTION, MODEL_OPTION, THREADS_OPTION, load_model
from .serve import serve
from .train import train

if TYPE_CHECKING:
    from torch import nn

    from ..checkpoint.memory_report import MemoryReport
    from ..decoder.config import DecoderConfig
    from ..generation.chat import ChatSession, Continuation
    from ..generation.mixin import TextStream
    from ..generation.settings import GenerationArguments
    from ..model import BitNet

DEFAULT_NEW_TOKENS = 200
"""Length of a text on the command line: about a screenful, and Ctrl-C ends it earlier."""


def generation_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of generation, and hands them on as one dict ``arguments``."""

    @click.option(
        "--temperature", metavar="T", type=click.FloatRange(min=0), help="Divides the scores; 0 is greedy."
    )
    @click.option(
        "--top-k", metavar="K", type=click.IntRange(min=0), help="Keep the K best tokens; 0 keeps all."
    )
    @click.option(
        "--top-p", metavar="P", type=click.FloatRange(0, 1), help="Keep the best tokens, together P likely."
    )
    @click.option(
        "--min-p", metavar="P", type=click.FloatRange(0, 1), help="Drop tokens below P times the likeliest."
    )
    @click.option(
        "--repetition-penalty",
        metavar="R",
        type=click.FloatRange(min=0, min_open=True),
        help="Above 1: make tokens less likely that were there already.",
    )
    @click.option("--seed", metavar="S", type=click.IntRange(0, 2**63 - 1), help="For the same text again.")
    @click.option(
        "--stop", "stop_strings", multiple=True, metavar="TEXT", help="End before TEXT. Repeatable."
    )
    @click.option(
        "--prompt-lookup-num-tokens",
        metavar="N",
        type=click.IntRange(min=0),
        help="Guess up to N tokens at once in a text that repeats itself; changes the speed only.  "
        "[default: 10; 0 is off]",
    )
    @click.option(
        "--cache-dtype",
        type=click.Choice(["float32", "bfloat16", "int8"]),
        help="Of keys and values: the smaller, the faster long texts, and the coarser.  [default: float32]",
    )
    @functools.wraps(command)
    def wrapper(
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        repetition_penalty: float | None,
        seed: int | None,
        stop_strings: tuple[str, ...],
        prompt_lookup_num_tokens: int | None,
        cache_dtype: str | None,
        **rest: Any,
    ) -> None:
        filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        given = {name: value for name, value in filters.items() if value is not None}
        arguments: dict[str, Any] = {"repetition_penalty": repetition_penalty, "seed": seed}
        if given.pop("temperature", None) == 0:
            if given:
                option = "--" + next(iter(given)).replace("_", "-")
                raise click.UsageError(f"{option} has no effect with --temperature 0, which is greedy")
            arguments["do_sample"] = False
        elif temperature is not None or given:
            arguments |= {"do_sample": True, "temperature": temperature, **given}
        if not all(stop_strings):
            raise click.UsageError("--stop: expected a text, got an empty one")
        arguments["stop_strings"] = stop_strings or None
        arguments["prompt_lookup_num_tokens"] = prompt_lookup_num_tokens
        if cache_dtype is not None:
            import torch

            arguments["cache_dtype"] = getattr(torch, cache_dtype)
        command(arguments=arguments, **rest)

    return wrapper


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("bitnet_ops"), prog_name="bitnet-ops")
def commands() -> None:
    """Ternary (1.58-bit) language models on ordinary CPUs.

    A model is a folder in the Hugging Face layout (config.json, *.safetensors, tokenizer.json), a .gguf file,
    or a name on the Hugging Face hub (owner/repo, owner/repo:file.gguf), which is downloaded once. Without
    --model the commands use a small model that ships with bitnet-ops and writes in the manner of Jane Austen.

    \b
    Examples:
      bitnet-ops generate "It is a truth universally"
      bitnet-ops generate --model bitnet-b1.58-2B-4T --temperature 0 "The capital of France is"
      bitnet-ops chat --model microsoft/bitnet-b1.58-2B-4T
      bitnet-ops train --text novel.txt --out novel-model
      bitnet-ops convert bitnet-b1.58-2B-4T bitnet-here
      bitnet-ops eval --model bitnet-here --text novel.txt
      bitnet-ops embed --model bitnet-embedding-0.6b --file lines.txt --out lines.safetensors
      bitnet-ops serve --model microsoft/bitnet-b1.58-2B-4T
      bitnet-ops info

    `bitnet-ops COMMAND --help` says more.
    """  # noqa: D301, click wants the character


@commands.command()
@click.argument("prompt")
@MODEL_OPTION
@click.option(
    "--max-new-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    help=f"Length of the continuation.  [default: {DEFAULT_NEW_TOKENS}, less where the context ends]",
)
@generation_options
@click.option(
    "--echo/--no-echo", default=True, help="Print the prompt before its continuation.", show_default=True
)
@ACTIVATION_BITS_OPTION
@THREADS_OPTION
def generate(
    prompt: str,
    source: str | None,
    max_new_tokens: int | None,
    arguments: GenerationArguments,
    echo: bool,
    activation_bits: int | None,
    threads: int | None,
) -> None:
    """Continue PROMPT; "-" reads it from stdin.

    The text goes to stdout as it appears, the speed to stderr. Options of sampling that are not given come
    from the model's generation_config.json; a model without one is greedy until an option asks for sampling.

    \b
    Examples:
      bitnet-ops generate "Emma could not forgive her"
      bitnet-ops generate --temperature 0.7 --top-p 0.9 --seed 1 "Emma could not forgive her"
      bitnet-ops generate --temperature 0 --stop "." "Mr. Darcy"
      bitnet-ops generate --no-echo - < letter.txt > answer.txt
    """  # noqa: D301, click wants the character
    with expected_errors():
        if prompt == "-":
            # The line break that an editor or `echo` puts at the end is not meant as part of the text.
            prompt = sys.stdin.buffer.read().decode().removesuffix("\n")
        model = load_model(source, threads, activation_bits)
        ids = model.encode(prompt)["input_ids"]
        room = model.config.max_position_embeddings - ids.shape[1]
        arguments["max_new_tokens"] = max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, room))
        stream = model.stream(ids, **arguments)
        if echo:
            click.echo(prompt, nl=False)
        try:
            show(stream)
        except KeyboardInterrupt:
            raise click.Abort from None
        finally:
            click.echo()
    click.echo(speed(stream), err=True)


@commands.command()
@MODEL_OPTION
@click.option("--system", metavar="TEXT", help="System message: what the model should know or be.")
@click.option(
    "--max-new-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    help=f"Longest answer.  [default: up to the end of the context; {DEFAULT_NEW_TOKENS} without a template]",
)
@generation_options
@ACTIVATION_BITS_OPTION
@THREADS_OPTION
def chat(
    source: str | None,
    system: str | None,
    max_new_tokens: int | None,
    arguments: GenerationArguments,
    activation_bits: int | None,
    threads: int | None,
) -> None:
    """Talk with a model.

    Messages are put in the form of the checkpoint's chat template. A model without one was not trained to
    answer: then each line is appended to one growing text, and the model continues that.

    /clear starts anew, /exit or Ctrl-D ends. Ctrl-C breaks off an answer; at the prompt it ends. From a pipe
    or file every line is a message.

    \b
    Examples:
      bitnet-ops chat --model bitnet-b1.58-2B-4T --system "Answer in one sentence."
      bitnet-ops chat --temperature 0.8
    """  # noqa: D301, click wants the character
    from ..generation.chat import ChatSession, Continuation

    with expected_errors():
        model = load_model(source, threads, activation_bits)
        session: ChatSession | Continuation
        if model.chat_template is not None:
            session = ChatSession(model, system)
        elif system is not None:
            raise click.UsageError(
                "--system: this model has no chat template that could hold a system message"
            )
        else:
            click.echo("This model has no chat template: it continues the text that you begin.", err=True)
            session = Continuation(model)
            max_new_tokens = max_new_tokens or DEFAULT_NEW_TOKENS
        if max_new_tokens is not None:
            arguments["max_new_tokens"] = max_new_tokens
        interactive = sys.stdin.isatty()
        if interactive:
            click.echo("/clear starts anew, /exit ends, Ctrl-C breaks off an answer.", err=True)
        for line in lines(interactive):
            if line.strip() == "/exit":
                break
            if line.strip() == "/clear":
                session = type(session)(model, *([system] if system is not None else []))
            elif line.strip():
                answer(session, line, arguments, interactive)


@commands.command()
@MODEL_OPTION
@ACTIVATION_BITS_OPTION
@click.option(
    "--context",
    metavar="N",
    type=click.IntRange(min=1),
    help="Tokens of prompt and text, for the cache.  [default: 512, less where the model has less]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; memory is in bytes.")
@THREADS_OPTION
def info(
    source: str | None,
    activation_bits: int | None,
    context: int | None,
    as_json: bool,
    threads: int | None,
) -> None:
    """Show versions, instruction sets, threads, facts about a model, and what it takes in memory.

    The memory is that of a process that generates text. It is computed from the headers of the files.

    \b
    Examples:
      bitnet-ops info
      bitnet-ops info --model bitnet-b1.58-2B-4T --context 4096 --json
      BITNET_OPS_ISA=avx2 bitnet-ops info --model bitnet-b1.58-2B-4T
    """  # noqa: D301, click wants the character
    import torch

    from ..checkpoint.memory_report import memory_report
    from ..isa import isa, supported_isas

    with expected_errors():
        there = source is not None or DEFAULT_MODEL.is_dir()
        # Before the model is loaded, which would count as the program's own memory.
        memory = memory_report(source or DEFAULT_MODEL, context) if there else None
        model = load_model(source, threads, activation_bits) if there else None
        facts = {
            "bitnet-ops": importlib.metadata.version("bitnet_ops"),
            "torch": torch.__version__,
            "instruction set": f"{isa()} (supported here: {', '.join(supported_isas())})",
            "threads": str(torch.get_num_threads()),
            "model": "none: the package came without one, name one with --model",
        }
        if model is not None:
            facts |= {"model": str(source or DEFAULT_MODEL), **model_facts(model)}
    if as_json:
        bytes_ = None if memory is None else {**dataclasses.asdict(memory), "total": memory.total}
        click.echo(json.dumps({**facts, "memory": bytes_}, indent=2))
        return
    if memory is not None:
        facts |= memory_facts(memory)
    width = max(map(len, facts))
    for name, fact in facts.items():
        click.echo(f"{name:<{width}}  {fact}")


commands.add_command(serve)
commands.add_command(train)
commands.add_command(convert)
commands.add_command(embed)
commands.add_command(evaluate)


def model_facts(model: BitNet) -> dict[str, str]:
    """Sizes of a model, in words."""
    from ..layers.matrix import TernaryMatrix

    config = model.config
    matrices = [module for module in model.modules() if isinstance(module, TernaryMatrix)]
    ternary = sum(matrix.in_features * matrix.out_features for matrix in matrices)
    packed_bytes = sum(matrix.packed_weight.nbytes for matrix in matrices)
    others = sum(parameter.numel() for parameter in model.parameters())  # packed weights are buffers
    all_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    eos = ", ".join(map(str, config.eos_token_ids)) or "none"
    return {
        "layers": f"{config.num_hidden_layers}, hidden size {config.hidden_size}, feed-forward size "
        f"{config.intermediate_size}",
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key and value, size "
        f"{config.head_dim}",
        "context": f"{config.max_position_embeddings} tokens",
        "vocabulary": f"{config.vocab_size} tokens; end of text: {eos}",
        "parameters": f"{ternary + others:,}, of these ternary {ternary:,}",
        "bits per ternary weight": f"{8 * packed_bytes / ternary:.2f}" if ternary else "no packed layer",
        "activations": f"{config.activation_bits} bits, a scale for each {_scaled_inputs(config)}",
        "embedding": f"{_kind(model.model.embed_tokens)}, "
        + ("shared with the head" if config.tie_word_embeddings else "apart from the head"),
        "bytes in memory": f"{all_bytes:,}, of these ternary {packed_bytes:,}",
        "tokenizer": "none" if model.tokenizer is None else f"{model.tokenizer.get_vocab_size()} entries",
        "chat template": "no" if model.chat_template is None else "yes",
    }


def _scaled_inputs(config: DecoderConfig) -> str:
    """What shares a scale of activations."""
    return f"{config.group_size} inputs" if config.group_size and config.activation_bits == 8 else "token"


def _kind(matrix: nn.Module) -> str:
    """What the numbers of an embedding are."""
    weight = getattr(matrix, "weight", None)
    return "ternary" if weight is None else str(weight.dtype).removeprefix("torch.")


def memory_facts(memory: MemoryReport) -> dict[str, str]:
    """What takes how much, in words."""
    parts = {
        "weights": memory.weights,
        "copy of the head": memory.head_copy,
        "embedding and head": memory.table,
        f"cache, {memory.context} tokens": memory.cache,
        "activations": memory.activations,
        "tokenizer": memory.tokenizer,
        "Python and torch": memory.program,
        "at its peak": memory.total,
    }
    facts = {f"memory, {name}": f"{size / 2**20:,.0f} MiB" for name, size in parts.items()}
    if memory.table_in_file:
        in_file = f"rows are read from the file ({memory.table_in_file / 2**20:,.0f} MiB)"
        facts["memory, embedding and head"] = f"0 MiB: {in_file}"
    return facts


def show(pieces: Iterator[str]) -> None:
    """Prints a text as it appears."""
    for piece in pieces:
        click.echo(piece, nl=False)  # flushes


def answer(
    session: ChatSession | Continuation, text: str, arguments: GenerationArguments, interactive: bool
) -> None:
    """Prints one answer; where a person sits, Ctrl-C and errors end the answer only, not the program."""
    try:
        with contextlib.closing(session.reply(text, **arguments)) as pieces:  # so that the turn is recorded
            try:
                show(pieces)
            finally:
                click.echo()
    except KeyboardInterrupt:
        if not interactive:
            raise
    except ValueError as error:
        if not interactive:
            raise
        click.echo(f"Error: {error}. /clear starts a new conversation.", err=True)


def lines(interactive: bool) -> Iterator[str]:
    """What the user types, line by line, until the end of input."""
    if not interactive:
        for line in sys.stdin.buffer:
            yield line.decode().removesuffix("\n")
        return
    with contextlib.suppress(ImportError):  # line editing and history, where the system has it
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return


def speed(stream: TextStream) -> str:
    """One line about the time a text took."""
    prompt, new = len(stream.prompt_ids), len(stream.token_ids)
    words = f"prompt: {prompt} tokens, {prompt / stream.prompt_seconds:.1f} tokens/s"
    words += f"; new: {new} tokens"
    if new > 1:  # the first one comes out of the prompt's pass
        words += f", {(new - 1) / stream.decode_seconds:.1f} tokens/s"
    return words


def main() -> NoReturn:
    """The program, with its exit codes."""
    if hasattr(signal, "SIGPIPE"):
        # Like other tools: when `| head` has seen enough, end without a word.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        # A model may write letters that a code page of Windows has not: better "?" than an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = commands.main(prog_name="bitnet-ops", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:  # Ctrl-C; the line has been ended already
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second one must not spoil the exit
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
