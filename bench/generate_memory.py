"""Peak memory of new processes that generate and chat, and the time a model takes to load in one.

    python bench/generate_memory.py 2b4t-packed                # 512 tokens of context, five loads

Each figure is of a process of its own, because memory that was once taken may stay, and what was once
imported costs nothing. The certified head and prompt lookup are on, as they are by default. ``loading``
counts from the call of from_pretrained, after the imports; ``import`` is that of bitnet_ops after torch.
`bitnet-ops info --model FOLDER` predicts the peaks.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT_TOKENS = 128


def peak_bytes() -> int:
    """Peak resident memory of this program."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def child(kind: str, folder: str, context: int) -> None:
    """Does one of the things, and prints the numbers."""
    import torch

    begin = time.perf_counter()
    import bitnet_ops

    imported = time.perf_counter()
    model = bitnet_ops.from_pretrained(folder)
    loaded = time.perf_counter()
    if kind == "load":
        print(imported - begin, loaded - imported)
        return
    options = {"do_sample": True, "top_k": 50, "temperature": 0.6, "top_p": 0.9, "seed": 1}
    if kind == "generate":
        ids = torch.randint(1000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
        length = model.generate(
            ids, max_new_tokens=context - PROMPT_TOKENS, eos_token_id=(), **options
        ).shape[1]
    else:
        from bitnet_ops.generation.chat import ChatSession

        # One turn: a synthetic tokenizer reads an answer back as several times as many tokens.
        session = ChatSession(model)
        message = "What is it? " * 8
        for _ in session.reply(message, max_new_tokens=context - PROMPT_TOKENS, eos_token_id=(), **options):
            pass
        length = len(session.last.prompt_ids) + len(session.last.token_ids)
    print(peak_bytes(), length)


def run(kind: str, folder: str, context: int) -> list[float]:
    """The numbers of a new process."""
    command = [sys.executable, __file__, folder, "--context", str(context), "--child", kind]
    return list(
        map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--context", type=int, default=512, metavar="N", help="tokens (default 512)")
    parser.add_argument("--loads", type=int, default=5, metavar="N", help="loads to time (default 5)")
    parser.add_argument("--child", choices=["load", "generate", "chat"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.folder, arguments.context)
    for kind in ("generate", "chat"):
        peak, length = run(kind, arguments.folder, arguments.context)
        print(f"{kind:<9} {peak / 2**20:6.0f} MiB at its peak, {length:.0f} tokens")
    run("load", arguments.folder, arguments.context)  # warms the page cache
    times = [run("load", arguments.folder, arguments.context) for _ in range(arguments.loads)]
    for name, values in zip(("import", "loading"), zip(*times, strict=True), strict=True):
        print(f"{name:<9} {statistics.median(values):6.2f} s, {min(values):.2f} to {max(values):.2f}")
    return None


if __name__ == "__main__":
    main()
