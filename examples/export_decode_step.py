"""Exports a model's decode step, and writes a text with it in another process, without the model.

    python examples/export_decode_step.py export FOLDER
    python examples/export_decode_step.py run FOLDER "It is a truth universally acknowledged"

With --aoti the program is compiled ahead of time (AOTInductor; takes a C++ compiler).
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

import bitnet_ops  # registers the operators that the program calls
from bitnet_ops.checkpoint.config_json import parse_config
from bitnet_ops.integrations.export import export_decode_step, step_inputs

PROGRAM, COMPILED, CONFIG, TOKENIZER = "step.pt2", "step_aoti.pt2", "config.json", "tokenizer.json"


def export(model_folder: Path, folder: Path, aoti: bool) -> None:
    """Writes the program, and what else it takes to make a cache and to read its answers."""
    model = bitnet_ops.from_pretrained(model_folder)
    program = export_decode_step(model)
    folder.mkdir(parents=True, exist_ok=True)
    if aoti:
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / COMPILED))
    else:
        torch.export.save(program, folder / PROGRAM)
    for name in (CONFIG, TOKENIZER):
        (folder / name).write_bytes((model_folder / name).read_bytes())


def run(folder: Path, prompt: str, max_new_tokens: int, aoti: bool) -> str:
    """Continues a prompt, always with the best-scored token."""
    if aoti:
        step = torch._inductor.aoti_load_package(str(folder / COMPILED))
    else:
        step = torch.export.load(folder / PROGRAM).module()
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    config = parse_config(json.loads((folder / CONFIG).read_text()), folder / CONFIG)
    text = tokenizer.encode(prompt).ids
    cache = bitnet_ops.KVCache(config, 1, len(text) + max_new_tokens)
    ids = torch.tensor([text])
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            scores = step(*step_inputs(ids, cache))
            cache.length += ids.shape[1]
            ids = scores.argmax(-1, keepdim=True)
            text.append(int(ids))
    return tokenizer.decode(text)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=["export", "run"])
    parser.add_argument("folder", type=Path, help="of the exported program")
    parser.add_argument("prompt", nargs="?", default="It is a truth universally acknowledged")
    parser.add_argument("--model", type=Path, default=bitnet_ops.DEFAULT_MODEL, help="folder to export from")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--aoti", action="store_true", help="compiled ahead of time")
    arguments = parser.parse_args()
    if arguments.command == "export":
        export(arguments.model, arguments.folder, arguments.aoti)
    else:
        print(run(arguments.folder, arguments.prompt, arguments.max_new_tokens, arguments.aoti))


if __name__ == "__main__":
    main()
