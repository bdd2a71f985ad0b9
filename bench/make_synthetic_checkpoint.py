"""Writes a checkpoint of random weights in the published format of BitNet b1.58 2B4T or Ternary-Bonsai 1.7B.

    python bench/make_synthetic_checkpoint.py /tmp/bitnet-2b4t                # 1.2 GB, the real shapes
    python bench/make_synthetic_checkpoint.py /tmp/bonsai --model qwen3-1.7b  # 0.5 GB
    python bench/make_synthetic_checkpoint.py /tmp/bitnet-2l --layers 2 --tokenizer
    python bench/make_synthetic_checkpoint.py /tmp/bitnet-sparse --open-gates 0.2

Of what the weights say, time and memory of a forward pass depend only on the number of open gates in the
feed-forward blocks, so benchmarks can do without the real ones. Shapes, dtypes, names and the packing are
those of microsoft/bitnet-b1.58-2B-4T, or of a Qwen3 in MLX's 2-bit form with a float16 scale for each 128
inputs, embedding and tied head included (bitnet_ops/checkpoint/mlx.py draws it). The same arguments give the
same bytes. Weights are written a few MB at a time, whatever the size of the model.
"""

import argparse
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from comparison.shapes import SHAPES
from torch import Tensor
from tqdm import tqdm

CHUNK_BYTES = 8 << 20
"""Bytes made and written at a time: large enough for the speed of the disk, small beside the model."""

INITIAL_STD = 0.02
"""Standard deviation of the embedding (initializer_range of 2B4T). With a final hidden state of root mean
square 1 and 2560 inputs the logits of the tied head then have a standard deviation of 1."""

ALIGNMENT = 8
"""safetensors headers are padded with spaces to a multiple of 8 bytes, so that all tensors are aligned."""

FOUR_ZEROS = 0b01_01_01_01  # four codes of weight 0

DTYPES = {"packed": "U8", "gate": "U8", "words": "U32", "scales": "F16", "biases": "F16"}
"""By `Entry.kind`; the others are BF16."""

DTYPE_BYTES = {"U8": 1, "BF16": 2, "F16": 2, "U32": 4}

GROUP = 128
"""Inputs with one scale in the MLX form."""

MODELS = {name: SHAPES[name] for name in ("bitnet-2b4t", "qwen3-1.7b")}
"""Whose sizes are the defaults."""

SIZE_OPTIONS = (
    ("--layers", "num_hidden_layers", "decoder layers"),
    ("--hidden", "hidden_size", "width of the residual stream"),
    ("--intermediate", "intermediate_size", "width inside the feed-forward block"),
    ("--heads", "num_attention_heads", "query heads"),
    ("--kv-heads", "num_key_value_heads", "key and value heads"),
    ("--vocab", "vocab_size", "token ids"),
)
"""Option, the field that it sets, and its help."""

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The sizes of the model, as config.json names them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    in_groups: bool = False  # a Qwen3 in MLX's form

    @property
    def special_ids(self) -> tuple[int, int, int]:
        """Begin of text, end of text, end of turn: 128000, 128001 and 128009 at the real vocabulary size."""
        reserved = min(256, self.vocab_size // 4)
        first = self.vocab_size - reserved
        return first, first + 1, first + min(9, reserved - 1)

    def check(self) -> None:
        """Exits with a message where the published format cannot hold these sizes."""
        rest = self.hidden_size % self.num_attention_heads
        if not self.in_groups and (rest or self.head_dim % 2):
            raise SystemExit(f"--hidden: expected an even multiple of --heads, got {self.hidden_size}")
        for name, size in (
            ("--hidden", self.hidden_size),
            ("--intermediate", self.intermediate_size),
            ("--heads", self.num_attention_heads * self.head_dim),
        ):
            if self.in_groups and size % GROUP:
                raise SystemExit(f"{name}: expected a multiple of {GROUP} inputs, got {size}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise SystemExit(f"--kv-heads: expected a divisor of --heads, got {self.num_key_value_heads}")
        for name, rows in (
            ("--hidden", self.hidden_size),
            ("--intermediate", self.intermediate_size),
            ("--kv-heads", self.num_key_value_heads * self.head_dim),
        ):
            if rows % 4:
                raise SystemExit(
                    f"{name}: expected {rows} rows to be a multiple of 4, which are packed into one"
                )
        if self.vocab_size < 16:
            raise SystemExit(
                f"--vocab: expected at least 16, which leaves room for 3 special ids, got {self.vocab_size}"
            )


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: "packed" or "gate" (U8), "scale", "norm" or "embedding" (BF16).

    In MLX's form "words" (U32), "scales" and "biases" (F16).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    inputs: int = 0  # of the projection that a scale belongs to

    @property
    def dtype(self) -> str:
        return DTYPES.get(self.kind, "BF16")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def entries(shape: Shape) -> Iterator[Entry]:
    """Every tensor of the checkpoint."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    q_size, kv_size = (
        heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads)
    )
    if shape.in_groups:
        yield from matrix_in_groups("model.embed_tokens", shape.vocab_size, hidden)
        more_norms = {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim}
    else:
        yield Entry("model.embed_tokens.weight", "embedding", (shape.vocab_size, hidden))
        more_norms = {"self_attn.attn_sub_norm": hidden, "mlp.ffn_sub_norm": intermediate}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden, **more_norms}
        for name, size in norms.items():
            yield Entry(f"{prefix}.{name}.weight", "norm", (size,))
        for name, outputs, inputs in (
            ("self_attn.q_proj", q_size, hidden),
            ("self_attn.k_proj", kv_size, hidden),
            ("self_attn.v_proj", kv_size, hidden),
            ("self_attn.o_proj", hidden, q_size),
            ("mlp.gate_proj", intermediate, hidden),
            ("mlp.up_proj", intermediate, hidden),
            ("mlp.down_proj", hidden, intermediate),
        ):
            if shape.in_groups:
                yield from matrix_in_groups(f"{prefix}.{name}", outputs, inputs)
                continue
            kind = "gate" if name == "mlp.gate_proj" else "packed"
            yield Entry(f"{prefix}.{name}.weight", kind, (outputs // 4, inputs))
            yield Entry(f"{prefix}.{name}.weight_scale", "scale", (1,), inputs)
    yield Entry("model.norm.weight", "norm", (hidden,))


def matrix_in_groups(name: str, outputs: int, inputs: int) -> Iterator[Entry]:
    """The three tensors of a matrix in MLX's form."""
    yield Entry(f"{name}.weight", "words", (outputs, inputs // 16))
    yield Entry(f"{name}.scales", "scales", (outputs, inputs // GROUP), inputs)
    yield Entry(f"{name}.biases", "biases", (outputs, inputs // GROUP), inputs)


def contents(entry: Entry, generator: torch.Generator, open_gates: float) -> Iterator[Tensor]:
    """The tensor's numbers, a chunk of uint8 bytes at a time."""
    if entry.kind in ("scales", "biases"):
        # The same numbers for both but for the sign, so they come from the name.
        generator = torch.Generator().manual_seed(zlib.crc32(entry.name.rpartition(".")[0].encode()))
    if entry.kind == "gate" and open_gates < 0.5:
        # Half of the random rows open for a token. Rows of zeros never do, four of them at a time.
        closed = torch.rand(entry.shape[0], generator=generator) >= 2 * open_gates
    else:
        closed = torch.zeros(entry.shape[0], dtype=torch.bool)
    for start in range(0, entry.nbytes, CHUNK_BYTES):
        count = min(CHUNK_BYTES, entry.nbytes - start) // DTYPE_BYTES[entry.dtype]
        if entry.dtype == "U8":
            # Each weight is -1, 0 or 1 with equal chance; Gaussian master weights quantise to 31 % zeros.
            codes = _legal_bytes()[torch.randint(3**4, (count,), generator=generator)]
            row = torch.arange(start, start + count) // entry.shape[1]
            yield codes.masked_fill_(closed[row], FOUR_ZEROS)
            continue
        if entry.dtype == "U32":  # of four such bytes each
            yield _legal_bytes()[torch.randint(3**4, (4 * count,), generator=generator)]
            continue
        if entry.dtype == "F16":
            # Groups have different ones, or they would be taken for one scale a row.
            numbers = 0.9 + 0.2 * torch.rand(count, generator=generator)
            usual = INITIAL_STD * 1.5**0.5 if "embed" in entry.name else (2 / 3 * entry.inputs) ** -0.5
            yield (numbers * (usual if entry.kind == "scales" else -usual)).half().view(torch.uint8)
            continue
        if entry.kind == "scale":
            # A ternary weight has variance 2/3. This scale keeps the root mean square from input to output.
            numbers = torch.full((count,), (2 / 3 * entry.inputs) ** -0.5)
        elif entry.kind == "norm":
            numbers = 1 + 0.1 * torch.randn(
                count, generator=generator
            )  # not all 1, so that leaving it out shows
        else:
            numbers = INITIAL_STD * torch.randn(count, generator=generator)
        yield numbers.bfloat16().view(torch.uint8)


def write_weights(file: Path, shape: Shape, seed: int, open_gates: float) -> None:
    """Streams model.safetensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries(shape):
        start, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    generator = torch.Generator().manual_seed(seed)
    draft = file.with_name(file.name + ".part")
    with (
        draft.open("wb") as out,
        tqdm(total=end, desc=file.name, unit="B", unit_scale=True, disable=None) as progress,
    ):
        out.write(len(text).to_bytes(8, "little") + text)
        for entry in entries(shape):
            for chunk in contents(entry, generator, open_gates):
                out.write(chunk.numpy().data)
                progress.update(chunk.numel())
    os.replace(draft, file)


def write_json_files(folder: Path, shape: Shape) -> None:
    """config.json and generation_config.json with the fields of the published ones."""
    begin, end, turn = shape.special_ids
    quantization = {"group_size": GROUP, "bits": 2}
    of_model: dict[str, object] = {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "model_type": "qwen3",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "quantization": quantization,
        "quantization_config": quantization,
    }
    if not shape.in_groups:
        of_model = {
            "architectures": ["BitNetForCausalLM"],
            "hidden_act": "relu2",
            "max_position_embeddings": 4096,
            "model_type": "bitnet",
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "quantization_config": {
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",
                "quantization_mode": "offline",
            },
        }
    config = {
        "bos_token_id": begin,
        "eos_token_id": end,
        "hidden_size": shape.hidden_size,
        "initializer_range": INITIAL_STD,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
        **of_model,
    }
    generation = {
        "bos_token_id": begin,
        "eos_token_id": [end, turn],
        "do_sample": True,
        "max_length": 4096,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, shape: Shape) -> None:
    """A tokenizer that reads text byte by byte and writes a made-up word for every other id."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = dict(zip(shape.special_ids, SPECIAL_TOKENS, strict=True))
    if shape.special_ids[0] < len(alphabet):
        raise SystemExit(
            f"--tokenizer: expected a --vocab of at least 342 for the 256 bytes, got {shape.vocab_size}"
        )
    # "Ġ" is how byte-level tokenizers spell a space at the start of a word.
    words = {
        special.get(token) or (alphabet[token] if token < len(alphabet) else f"Ġw{token}"): token
        for token in range(shape.vocab_size)
    }
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[0]} $A", special_tokens=[(SPECIAL_TOKENS[0], shape.special_ids[0])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1], "chat_template": CHAT_TEMPLATE}
        ),
        encoding="utf-8",
    )


def _legal_bytes() -> Tensor:
    """The 81 bytes of four codes in {0, 1, 2}; uint8 [81]."""
    codes = torch.cartesian_prod(*[torch.arange(3)] * 4)
    return (codes << torch.tensor([0, 2, 4, 6])).sum(1).to(torch.uint8)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="made where it does not exist; files in it are replaced")
    parser.add_argument(
        "--model", choices=MODELS, default="bitnet-2b4t", help="what it has (default bitnet-2b4t)"
    )
    for option, name, what in SIZE_OPTIONS:
        default = " or ".join(str(getattr(model, name)) for model in MODELS.values())
        parser.add_argument(
            option, dest=name, type=_positive, metavar="N", help=f"{what} (default {default})"
        )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights (default 0)")
    parser.add_argument(
        "--open-gates",
        type=_share,
        default=0.5,
        metavar="F",
        help="share of gates that a token opens, 0 to 0.5; of down_proj's inputs about two thirds of it are "
        "not zero (default 0.5, all weights random)",
    )
    parser.add_argument(
        "--tokenizer", action="store_true", help="write a trivial tokenizer and chat template too"
    )
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    in_groups = arguments.model == "qwen3-1.7b"
    if in_groups and arguments.open_gates != 0.5:
        parser.error("--open-gates: expected bitnet-2b4t, the model with squared ReLU")
    sizes = {name: getattr(arguments, name) or getattr(model, name) for _, name, _ in SIZE_OPTIONS}
    head_dim = model.head_dim if in_groups else sizes["hidden_size"] // sizes["num_attention_heads"]
    shape = Shape(**sizes, head_dim=head_dim, in_groups=in_groups)
    shape.check()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_json_files(arguments.folder, shape)
    if arguments.tokenizer:
        write_tokenizer(arguments.folder, shape)
    write_weights(arguments.folder / "model.safetensors", shape, arguments.seed, arguments.open_gates)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 0.5:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 0.5, got {value}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return value


if __name__ == "__main__":
    main()
