"""2B4T in litespark-inference, in its runtime without torch, as its loader makes it: the head has 4 bits."""

import ctypes
import os

import numpy as np
from litespark_inference.torchless import kernel
from litespark_inference.torchless.model import BitNetConfig, PackedBitNetModel, PackedLayer, PackedProjection
from litespark_inference.torchless.runtime import forward_one, forward_prefill, init_state

from .engine import SteppedEngine

CONTEXT = 1024


def make(sizes: dict[str, float]) -> "Litespark":
    """Random weights.

    Args:
        sizes: of the model, as config.json names them.
    """
    config = BitNetConfig(
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        intermediate_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["max_position_embeddings"],
        rms_norm_eps=sizes["rms_norm_eps"],
        rope_theta=sizes["rope_theta"],
    )
    return Litespark(config)


class Litespark(SteppedEngine):
    """Its Python loop over layers, which calls its kernels."""

    def __init__(self, config: BitNetConfig) -> None:
        self.vocab_size = config.vocab_size
        self._cpus = sorted(os.sched_getaffinity(0))
        self._random = np.random.default_rng(0)
        hidden, inner = config.hidden_size, config.intermediate_size
        keys = hidden // config.num_heads * config.num_kv_heads
        layers = [
            PackedLayer(
                q_proj=self._projection(hidden, hidden),
                k_proj=self._projection(keys, hidden),
                v_proj=self._projection(keys, hidden),
                o_proj=self._projection(hidden, hidden),
                gate_proj=self._projection(inner, hidden),
                up_proj=self._projection(inner, hidden),
                down_proj=self._projection(hidden, inner),
                input_norm=_ones(hidden),
                post_attn_norm=_ones(hidden),
                attn_sub_norm=_ones(hidden),
                ffn_sub_norm=_ones(inner),
            )
            for _ in range(config.num_layers)
        ]
        self._model = PackedBitNetModel(
            config=config,
            embed_tokens=None,
            final_norm=_ones(hidden),
            layers=layers,
            embed_int4=self._random.integers(0, 256, (config.vocab_size, hidden // 2), dtype=np.uint8),
            embed_scale=np.full(config.vocab_size, 0.01, dtype=np.float32),
        )
        kernel.ensure_built()

    def _projection(self, rows: int, columns: int) -> PackedProjection:
        two_bits = np.array([sum(c << 2 * n for n, c in enumerate(_digits(v))) for v in range(81)], np.uint8)
        return PackedProjection(
            w_packed=two_bits[self._random.integers(0, 81, (rows, columns // 4), dtype=np.uint8)],
            w_sum=np.zeros(rows, dtype=np.int32),
            scale=(1.5 / columns) ** 0.5,
            in_features=columns,
            out_features=rows,
        )

    def set_threads(self, count: int) -> None:
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(count)
        # Numpy's threads, for attention, have no such call: so they share the processors that are left.
        for task in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(task), self._cpus[:count])

    def prefill(self, ids: list[int]) -> None:
        self._state = init_state(self._model, CONTEXT)
        self._next = int(forward_prefill(self._model, self._state, ids).argmax())

    def step(self) -> None:
        self._next = int(forward_one(self._model, self._state, self._next).argmax())


def _ones(size: int) -> np.ndarray:
    """bfloat16, as uint16."""
    return np.full(size, 0x3F80, dtype=np.uint16)


def _digits(value: int) -> list[int]:
    return [value // 3**n % 3 for n in range(4)]
