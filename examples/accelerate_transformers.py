"""A BitNet model in transformers before and after bitnet_ops.accelerate: memory and tokens per second.

    python examples/accelerate_transformers.py bitnet-b1.58-2B-4T

FOLDER is the published checkpoint; python bench/make_synthetic_checkpoint.py FOLDER makes one of the same
shape with random weights. The model needs 5 GB before it is accelerated.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import bitnet_ops

PAGE_BYTES = 4096


def resident_bytes() -> int:
    """Memory that this process has now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


def seconds(model: PreTrainedModel, ids: torch.Tensor, new: int) -> float:
    """Time of so many greedy tokens."""
    begin = time.perf_counter()
    model.generate(ids, min_new_tokens=new, max_new_tokens=new, do_sample=False)
    return time.perf_counter() - begin


def report(state: str, model: PreTrainedModel, ids: torch.Tensor, new: int) -> None:
    """One line about speed and memory."""
    seconds(model, ids, 2)  # transformers compiles its quantisers at the first tokens
    first, whole = seconds(model, ids, 1), seconds(model, ids, 1 + new)
    print(
        f"{state}: prompt of {ids.shape[1]} tokens in {first:.2f} s, then {new / (whole - first):.2f} "
        f"tokens/s, {resident_bytes() / 1e9:.2f} GB"
    )


def main() -> None:
    """Loads, measures, accelerates, measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="checkpoint folder")
    parser.add_argument("--prompt-tokens", metavar="N", type=int, default=32)
    parser.add_argument("--new-tokens", metavar="N", type=int, default=16)
    parser.add_argument(
        "--eager", action="store_true", help="do not wait for torch.compile, which transformers' layers call"
    )
    arguments = parser.parse_args()

    with torch.compiler.set_stance("force_eager" if arguments.eager else "default"):
        model = AutoModelForCausalLM.from_pretrained(arguments.folder)
        shape = (1, arguments.prompt_tokens)
        ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        report("transformers", model, ids, arguments.new_tokens)
        begin = time.perf_counter()
        bitnet_ops.accelerate(model)
        print(f"accelerate: {time.perf_counter() - begin:.1f} s")
        report("accelerated", model, ids, arguments.new_tokens)


if __name__ == "__main__":
    main()
