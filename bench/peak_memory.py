"""Prints the name of a model and its peak memory in bytes: in all, and over a prompt and a few tokens.

The first covers what making the model takes for a moment, and differs from run to run by what the heap keeps
of it, up to 0.7 GB. Run as a process of its own, because it covers everything the process ever held:

    python bench/peak_memory.py bitnet
"""

import argparse
import re
from pathlib import Path

import torch
from subjects import SUBJECTS

from bitnet_ops.layers.memory import give_back_freed_memory


def main() -> None:
    """Runs the model and prints its name and peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    arguments = parser.parse_args()
    # Made outside: of weights that are made inside, or need no gradient, F.linear copies the whole head.
    subject = SUBJECTS[arguments.subject]()
    making = peak_bytes()
    give_back_freed_memory()  # of making it, which may or may not be 0.7 GB
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    with torch.inference_mode():
        ids, cache = subject.prefill(torch.randint(1000, (1, arguments.prompt_tokens)))
        for _ in range(4):
            ids = subject.step(ids, cache)
    running = peak_bytes()
    print(subject.name, max(making, running), running)


def peak_bytes() -> int:
    """Peak resident memory of this program.

    Not getrusage: its figure begins with that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
    main()
