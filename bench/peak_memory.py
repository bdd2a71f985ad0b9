"""Prints the name of one model, and its peak resident memory in bytes over a prompt and a few tokens.

Run as a process of its own, because the peak of a process covers everything it ever held:

    python bench/peak_memory.py bitnet
"""

import argparse
import re
from pathlib import Path

import torch
from subjects import SUBJECTS


def main() -> None:
    """Runs the model and prints its name and peak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    arguments = parser.parse_args()
    # Made outside: of weights that are made inside, or need no gradient, F.linear copies the whole head.
    subject = SUBJECTS[arguments.subject]()
    with torch.inference_mode():
        ids, cache = subject.prefill(torch.randint(1000, (1, arguments.prompt_tokens)))
        for _ in range(4):
            ids = subject.step(ids, cache)
    print(subject.name, peak_bytes())


def peak_bytes() -> int:
    """Peak resident memory of this program.

    Not getrusage: its figure begins with that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
    main()
