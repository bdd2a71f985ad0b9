"""A GGUF file in llama.cpp, through llama-cpp-python."""

import ctypes

import llama_cpp
import numpy as np

from .engine import SteppedEngine

CONTEXT = 1024


def make(file: str, vocab_size: int) -> "LlamaCpp":
    """Loads a file, mapped, as llama.cpp does by default; so are all other settings."""
    return LlamaCpp(file, vocab_size)


class LlamaCpp(SteppedEngine):
    """llama.cpp, called as its own programs call it: only the last token of a prompt has scores."""

    def __init__(self, file: str, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"{file}: llama.cpp does not load it")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = CONTEXT
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ValueError(f"{file}: llama.cpp makes no context")
        self._next = 0

    def set_threads(self, count: int) -> None:
        llama_cpp.llama_set_n_threads(self._context, count, count)

    def prefill(self, ids: list[int]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._read(ids)

    def step(self) -> None:
        self._read([self._next])

    def _read(self, ids: list[int]) -> None:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode: {status}")
        scores = llama_cpp.llama_get_logits_ith(self._context, -1)
        address = ctypes.cast(scores, ctypes.POINTER(ctypes.c_float))
        self._next = int(np.ctypeslib.as_array(address, (self.vocab_size,)).argmax())
