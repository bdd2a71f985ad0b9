"""What rounding activations costs a model that was trained with float ones.

    python bench/activation_error.py --text novel.txt          # some minutes: trains a small model first

The model is a small Qwen3 whose projections are ternary with a scale for each 128 inputs, as those of
Ternary-Bonsai; training never rounds activations. Logits of a text that it was not trained on are compared
with the same forward pass in float64:

    16 bits        one scale a token
    8-bit blocks   a scale for each 128 inputs
    8 bits         one scale a token, as BitNet models are trained

The first two are the operators of this package, the last is the float64 pass with rounded inputs of
projections. The head is dense; "with a ternary head" its input is rounded likewise.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_ops import BitLinear, BitNet, DecoderConfig, reference
from bitnet_ops.decoder.cache import rotation_tables
from bitnet_ops.training.corpus import END_OF_TEXT, read_corpus
from bitnet_ops.training.loop import TrainOptions, train

GROUP = 128
WIDTH = 256
CONTEXT = 256

Round = Callable[[Tensor], Tensor]


class GroupTernaryLinear(nn.Linear):
    """Trains ternary weights with an absmean scale for each group of inputs; activations stay floats."""

    def ternary(self) -> tuple[Tensor, Tensor]:
        """Weights in {-1, 0, 1} [N, K], and scales [N, K / 128]."""
        groups = self.weight.detach().float().unflatten(1, (-1, GROUP))
        scale = groups.abs().mean(-1, keepdim=True).clamp(min=reference.ABSMAX_FLOOR).half().float()
        return (groups / scale).round().clamp(-1, 1).flatten(1), scale.squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """The gradient passes the rounding (straight-through)."""
        w, scale = self.ternary()
        rounded = w * scale.repeat_interleave(GROUP, 1)
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


def packed(trained: BitNet) -> BitNet:
    """The same model with `BitLinear` projections."""
    model = BitNet(trained.config.replace(activation_bits=16, group_size=GROUP)).eval().requires_grad_(False)
    model.load_state_dict(
        {name: tensor for name, tensor in trained.state_dict().items() if "_proj" not in name}, strict=False
    )
    for name, module in trained.named_modules():
        if isinstance(module, GroupTernaryLinear):
            w, scale = module.ternary()
            layer = BitLinear.from_ternary(
                w.to(torch.int8), scale.T.half(), activation_bits=16, group_size=GROUP
            )
            model.set_submodule(name, layer)
    return model


def exact_hidden(model: BitNet, ids: Tensor, rounded: Round) -> Tensor:
    """The forward pass in float64 up to the head, with inputs of projections as ``rounded`` gives them."""
    config = model.config
    cos, sin = (table[0].double() for table in rotation_tables(config, torch.arange(ids.shape[1])))
    turn = torch.complex(cos, sin)[:, None]
    past = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()

    def norm(x: Tensor, module: nn.Module) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight.double()

    def linear(x: Tensor, layer: BitLinear) -> Tensor:
        return rounded(x) @ layer.dense().double().T

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, config.head_dim))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        turned = torch.complex(first, second) * turn
        return torch.cat((turned.real, turned.imag), -1)

    x = model.model.embed_tokens.weight.double()[ids]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        n = norm(x, layer.input_layernorm)
        q = rotate(norm(heads(linear(n, attention.q_proj)), attention.q_norm))
        k = rotate(norm(heads(linear(n, attention.k_proj)), attention.k_norm))
        v = heads(linear(n, attention.v_proj))
        k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], 2) for y in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * config.score_scale
        y = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~past, -torch.inf).softmax(-1), v)
        x = x + linear(y.flatten(-2), attention.o_proj)
        m = norm(x, layer.post_attention_layernorm)
        gate = linear(m, mlp.gate_proj)
        x = x + linear(gate * gate.sigmoid() * linear(m, mlp.up_proj), mlp.down_proj)
    return norm(x, model.model.norm)


def steps_of(largest: int, group: int) -> Round:
    """Rounds to integers up to ``largest``, with a scale for each ``group`` inputs; 0 for one a token."""

    def rounded(x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (-1, group or x.shape[-1]))
        scale = largest / parts.abs().amax(-1, keepdim=True).clamp(min=reference.ABSMAX_FLOOR)
        return ((parts * scale).round() / scale).flatten(-2)

    return rounded


ROUNDS = {
    "16 bits": steps_of(reference.LARGEST_Q[16], 0),
    "8-bit blocks": steps_of(reference.LARGEST_Q[8], GROUP),
    "8 bits": steps_of(reference.LARGEST_Q[8], 0),
}
WIDTHS = {"16 bits": 16, "8-bit blocks": 8}


def hidden_states(model: BitNet, kind: str, ids: Tensor) -> Tensor:
    """float64, by the operators where there are some."""
    if kind not in WIDTHS:
        return exact_hidden(model, ids, ROUNDS[kind])
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.activation_bits = WIDTHS[kind]
    return model.hidden_states(ids).double()


def divergence(exact: Tensor, given: Tensor) -> float:
    """KL(exact || given) in nats, the mean over tokens."""
    log_p, log_q = exact.log_softmax(-1), given.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--windows", type=int, default=16, help=f"of {CONTEXT} tokens that are compared")
    arguments = parser.parse_args()
    corpus = read_corpus(arguments.text, vocab_size=4096, held_out=0.02, seed=0)
    end = corpus.tokenizer.token_to_id(END_OF_TEXT)
    config = DecoderConfig(
        vocab_size=corpus.tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        qk_norm=True,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    options = TrainOptions(steps=arguments.steps, sequence_length=CONTEXT, evaluate_every=arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, corpus, options, Path(folder), linear=GroupTernaryLinear)
    model = packed(result.model)
    ids = corpus.test.ids[: arguments.windows * CONTEXT].view(-1, CONTEXT)
    with torch.inference_mode():
        table = model.head_weight.double()
        hidden = exact_hidden(model, ids, lambda x: x)
        exact = hidden @ table.T
        loss = F.cross_entropy(exact[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        print(f"{arguments.steps} steps; {ids.numel()} tokens of {float(loss):.3f} nats")
        print("| activations | error of logits | KL, nats | with a ternary head | KL, nats |")
        print("|---|---:|---:|---:|---:|")
        for kind, rounded in ROUNDS.items():
            given = hidden_states(model, kind, ids)
            cells = [kind]
            for states in (given, rounded(given)):
                logits = states @ table.T
                error = (logits - exact).norm() / exact.norm()
                cells += [f"{float(error):.2g}", f"{divergence(exact, logits):.2g}"]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
