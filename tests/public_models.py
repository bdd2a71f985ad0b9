"""Models of families that transformers has not, written out from their public descriptions in plain PyTorch.

Sources: the code beside 1bitLLM's and openbmb's models (their own modeling files), as copied in public
repositories, and for MiniCPM transformers' later version. Everything is computed in the dtype that is asked
for, float32 as published or float64 as the exact model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class PublicModel:
    """The content of config.json, and the tensors of the checkpoint by name."""

    data: dict[str, Any]
    tensors: dict[str, Tensor]
    largest_q: int | None = None
    """Inputs of float projections are rounded to integers up to this, times a scale; None leaves them."""

    @classmethod
    def random(
        cls,
        data: dict[str, Any],
        seed: int,
        projection: Callable[[int, int, torch.Generator], Tensor],
        sub_norms: tuple[str, ...] = (),
    ) -> "PublicModel":
        """A model of these settings.

        Args:
            data: the content of config.json.
            seed: of the weights.
            projection: makes a matrix [N, K].
            sub_norms: names of the norms in front of o_proj and of down_proj.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        hidden, inner = data["hidden_size"], data["intermediate_size"]
        kv = hidden // data["num_attention_heads"] * data["num_key_value_heads"]
        matrices = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        norms |= dict(zip(sub_norms, (hidden, inner), strict=False))
        tensors = {"model.norm.weight": 1 + 0.2 * normal(hidden)}
        tensors["model.embed_tokens.weight"] = normal(data["vocab_size"], hidden)
        if not data.get("tie_word_embeddings", True):
            tensors["lm_head.weight"] = normal(data["vocab_size"], hidden)
        for layer in range(data["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            for name, size in norms.items():
                tensors[f"{at}.{name}.weight"] = 1 + 0.2 * normal(size)
            for name, (n, k) in matrices.items():
                tensors[f"{at}.{name}.weight"] = projection(n, k, generator)
        return cls(data, tensors)

    def logits(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T] to [B, T, V]."""
        data = self.data
        x = self._get("model.embed_tokens", dtype)[ids] * data.get("scale_emb", 1)
        times = data["scale_depth"] / math.sqrt(data["num_hidden_layers"]) if "scale_depth" in data else 1
        for layer in range(data["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            x = x + times * self.attention(self.norm(x, f"{at}.input_layernorm"), f"{at}.self_attn")
            x = x + times * self.feed_forward(self.norm(x, f"{at}.post_attention_layernorm"), f"{at}.mlp")
        x = self.norm(x, "model.norm")
        if "dim_model_base" in data:
            x = x / (data["hidden_size"] / data["dim_model_base"])
        head = "model.embed_tokens" if data.get("tie_word_embeddings", True) else "lm_head"
        return x @ self._get(head, dtype).T

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm."""
        root = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.data["rms_norm_eps"])
        return self._get(name, x.dtype) * (x * root)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """With "input_bits": absmax of each token, absmean of the matrix. Else the matrix as it is."""
        if "input_bits" in self.data:
            s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
            x = (x * s).round().clamp(-128, 127) / s
            codes, scale = self.quantized(name)
            return F.linear(x, codes.to(x.dtype) / scale.to(x.dtype))
        if self.largest_q is not None:
            s = self.largest_q / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
            x = (x * s).round() / s
        return F.linear(x, self._get(name, x.dtype))

    def quantized(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes -1, 0 and 1, and the reciprocal of the mean magnitude, in float32 as published."""
        weight = self.tensors[f"{name}.weight"].float()
        s = 1 / weight.abs().mean().clamp(min=1e-5)
        return (weight * s).round().clamp(-1, 1), s

    def attention(self, x: Tensor, at: str) -> Tensor:
        """Causal, with rotated halves, and a norm of all heads together where there is one."""
        data, length = self.data, x.shape[1]
        heads = data["num_attention_heads"]
        size = data["hidden_size"] // heads
        q, k, v = (
            self.linear(x, f"{at}.{name}").unflatten(-1, (-1, size)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        cos, sin = self.rotation(length, size, x.dtype)

        def rotate(y: Tensor) -> Tensor:
            low, high = y.chunk(2, -1)
            return y * cos + torch.cat((-high, low), -1) * sin

        groups = heads // data["num_key_value_heads"]
        k, v = rotate(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = rotate(q) @ k.transpose(-1, -2) / math.sqrt(size)
        scores = scores + torch.full((length, length), -torch.inf).triu(1)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        if f"{at}.inner_attn_ln.weight" in self.tensors:
            y = self.norm(y, f"{at}.inner_attn_ln")
        return self.linear(y, f"{at}.o_proj")

    def rotation(self, length: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, size], the halves equal."""
        half = torch.arange(0, size, 2, dtype=dtype) / size
        frequency = 1 / self.data.get("rope_theta", 10000.0) ** half
        times = 1.0
        scaling = self.data.get("rope_scaling")
        if scaling is not None:
            trained = scaling["original_max_position_embeddings"]
            factors = scaling["long_factor" if length > trained else "short_factor"]
            frequency = frequency / torch.tensor(factors, dtype=dtype)
            longer = max(self.data["max_position_embeddings"] / trained, 1)
            times = math.sqrt(1 + math.log(longer) / math.log(trained))
        angle = torch.outer(torch.arange(length, dtype=dtype), frequency).repeat(1, 2)
        return angle.cos() * times, angle.sin() * times

    def feed_forward(self, x: Tensor, at: str) -> Tensor:
        """Gated by SiLU, with a norm behind the gate where there is one."""
        y = F.silu(self.linear(x, f"{at}.gate_proj")) * self.linear(x, f"{at}.up_proj")
        if f"{at}.ffn_layernorm.weight" in self.tensors:
            y = self.norm(y, f"{at}.ffn_layernorm")
        return self.linear(y, f"{at}.down_proj")

    def _get(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.tensors[f"{name}.weight"].to(dtype)
