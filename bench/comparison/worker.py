"""The process of one model: makes it, then calls its engine as the driver says, a line of JSON each.

    python -m comparison.worker '{"engine": "llama_cpp_engine", "file": "model.gguf"}'

The first line that it writes is {"peak": its peak memory in bytes, "read": bytes of weights that a decoded
token reads, where the engine says it}. To {"call": method, "with": arguments} it answers {"result": ...}.
Whatever libraries print goes to standard error.
"""

import importlib
import json
import os
import sys

from .engine import end_with_parent


def main() -> None:
    """Serves until standard input ends."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    engine = importlib.import_module(f"comparison.{options.pop('engine')}").make(**options)
    count = getattr(engine, "weight_bytes", None)
    _write(answers, {"peak": engine.peak_bytes(), "read": count and count()})
    engine.forget_peak()
    for line in sys.stdin:
        request = json.loads(line)
        _write(answers, {"result": getattr(engine, request["call"])(**request["with"])})


def _write(answers, message: dict) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
