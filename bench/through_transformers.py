"""Peak memory and speed of a ternary checkpoint in transformers: as it is, accelerated, registered, and ours.

    python bench/through_transformers.py FOLDER [--new-tokens 48] [--repeats 3] [--ways registered ours ...]

Each way is a process of its own, which loads the model, measures a prompt of 128 tokens and decoding, in
``generate`` (greedy) and in a loop of forward passes, which compute all scores, and reports the peak of its
resident memory after loading, after ``generate`` and at the end. "plain" is transformers alone, without
torch.compile, which takes minutes to begin with. Ratios are to "ours".
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

WAYS = ("ours", "registered", "accelerated", "plain")


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(way: str, folder: str, new_tokens: int, repeats: int) -> dict[str, float]:
    """Loads and times one way."""
    import torch

    import bitnet_ops

    begin = time.perf_counter()
    if way == "ours":
        model = bitnet_ops.from_pretrained(folder)
    else:
        from transformers import AutoModelForCausalLM

        if way == "registered":
            bitnet_ops.register_transformers()
        model = AutoModelForCausalLM.from_pretrained(folder)
        if way == "accelerated":
            bitnet_ops.accelerate(model)
    found = {"load s": time.perf_counter() - begin, "peak after loading GB": peak_gb()}
    ids = torch.arange(100, 132).unsqueeze(0)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        tokens = 2 if way == "plain" else new_tokens
        options = {"do_sample": False}
        if way == "ours":
            options["prompt_lookup_num_tokens"] = 0
        else:
            model.generation_config.eos_token_id = None
        times = []
        for count in (1, tokens + 1) * (1 if way == "plain" else repeats):
            begin = time.perf_counter()
            made = model.generate(ids, **{**options, "max_new_tokens": count}).shape[1] - ids.shape[1]
            times.append((made, time.perf_counter() - begin))
        first = statistics.median(seconds for made, seconds in times if made == 1)
        rates = [(made - 1) / (seconds - first) for made, seconds in times if made > 1]
        found["generate tok/s"] = statistics.median(rates) if rates else float("nan")
        found["peak GB of generate"] = peak_gb()
        prompt = torch.arange(128).unsqueeze(0)
        read = _reader(way, model, prompt)
        times = []
        for _ in range(1 if way == "plain" else repeats + 1):
            begin = time.perf_counter()
            read()
            times.append(time.perf_counter() - begin)
        found["prompt tok/s"] = prompt.shape[1] / statistics.median(times[1:] or times)
        step = _ours(model, ids) if way == "ours" else _theirs(model, ids)
        found["forward tok/s"] = _rate(step, tokens, repeats)
    found["peak GB"] = peak_gb()
    return found


def _reader(way: str, model: object, ids: object) -> Callable[[], None]:
    """Reads a prompt into a new cache, with the scores of its last token."""
    import bitnet_ops

    if way == "ours":
        return lambda: model(ids, cache=bitnet_ops.KVCache(model.config, 1, ids.shape[1]), logits_to_keep=1)
    return lambda: model(ids, use_cache=True, logits_to_keep=1)


def _rate(step: Callable[[], None], tokens: int, repeats: int) -> float:
    step()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(tokens):
            step()
        times.append((time.perf_counter() - begin) / tokens)
    return 1 / statistics.median(times)


def _ours(model: object, ids: object) -> Callable[[], None]:
    import bitnet_ops

    cache = bitnet_ops.KVCache(model.config, 1, 1024)
    model(ids, cache=cache, logits_to_keep=1)
    return lambda: model(ids[:, -1:], cache=cache)


def _theirs(model: object, ids: object) -> Callable[[], None]:
    from transformers import DynamicCache

    from bitnet_ops.integrations.transformers_decoder import CACHE

    cache = {CACHE: DynamicCache(config=model.config)}
    model(ids, **cache, logits_to_keep=1)
    return lambda: model(ids[:, -1:], **cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.new_tokens, options.repeats)))
        return
    baseline: dict[str, float] = {}
    for way in options.ways:
        command = [sys.executable, __file__, options.folder, "--measure", way]
        command += ["--new-tokens", str(options.new_tokens), "--repeats", str(options.repeats)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(run.stdout.splitlines()[-1])
        baseline = baseline or found
        facts = [f"{name} {value:.2f}" for name, value in found.items()]
        ratios = [f"{found[name] / baseline[name]:.2f}" for name in found if name.endswith("tok/s")]
        print(f"{way:12} {', '.join(facts)}; speed to {options.ways[0]}: {' '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
