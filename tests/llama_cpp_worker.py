"""Writes greedy texts with llama.cpp, for tests/test_llama_cpp.py.

Arguments: a GGUF file and a number of tokens. Reads a JSON array of prompts, texts or ids, and writes a JSON
array with an object for each: ids of the prompt, ids of the text, the text, and the logits of each step.
"""

import json
import sys

import llama_cpp


def main(file: str, count: int) -> None:
    model = llama_cpp.Llama(
        file,
        n_ctx=0,
        n_threads=2,
        verbose=False,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,  # float16 by default: a rounding that has nothing to do with the file
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    texts = []
    for prompt in json.load(sys.stdin):
        model.reset()
        is_text = isinstance(prompt, str)
        ids = model.tokenize(prompt.encode(), add_bos=True, special=True) if is_text else prompt
        model.eval(ids)
        new: list[int] = []
        logits = []
        for _ in range(count):
            row = model.scores[model.n_tokens - 1]
            logits.append([float(score) for score in row])
            new.append(int(row.argmax()))
            model.eval(new[-1:])
        text = model.detokenize(new, prev_tokens=ids).decode("utf-8", errors="replace")
        texts.append({"prompt": ids, "new": new, "text": text, "logits": logits})
    json.dump(texts, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
