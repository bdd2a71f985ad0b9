"""Prints the peak resident memory of one model that reads a prompt and writes a few tokens.

Run as a process of its own, because the peak of a process covers everything it ever held:

    python bench/peak_memory.py bitnet
"""

import argparse
import resource

import torch
from subjects import SUBJECTS


def main() -> None:
    """Runs the model and prints its peak in bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    arguments = parser.parse_args()
    with torch.inference_mode():
        subject = SUBJECTS[arguments.subject]()
        logits, cache = subject.prefill(torch.randint(1000, (1, arguments.prompt_tokens)))
        for _ in range(4):
            logits = subject.step(logits.argmax(-1, keepdim=True), cache)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
