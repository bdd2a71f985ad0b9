"""Writes a greedy text with llama.cpp: run by tests with a Python that has llama-cpp-python.

Arguments: a GGUF file, a prompt, a number of tokens. Prints one JSON object: ids of the prompt, ids of the text,
the text, and for each step the logits.
"""

import json
import sys

import llama_cpp


def main(file: str, prompt: str, count: int) -> None:
    model = llama_cpp.Llama(
        file,
        n_ctx=0,
        n_threads=2,
        verbose=False,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,  # float16 by default: one rounding that we do not have
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    ids = model.tokenize(prompt.encode(), add_bos=True, special=True)
    model.eval(ids)
    new, logits = [], []
    for _ in range(count):
        row = model.scores[model.n_tokens - 1]
        logits.append([float(score) for score in row])
        new.append(int(row.argmax()))
        model.eval(new[-1:])
    text = model.detokenize(new, prev_tokens=ids).decode("utf-8", errors="replace")
    print(json.dumps({"prompt": ids, "new": new, "text": text, "logits": logits}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
