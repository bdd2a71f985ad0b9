"""Small random models with a tokenizer, for the tests of generation, chat and command line."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bitnet_ops import BitLinearQAT, BitNet, pack
from bitnet_ops.decoder.config import BitNetConfig

CORPUS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,",
    "must be in want of a wife. However little known the feelings or views of such a man may be",
    "Größe und Übermaß, naïve façade, 你好世界, здравствуй мир, 🙂🙃🚀 and so on.\n\n",
]

EOS, USER, ASSISTANT = "<eos>", "<user>", "<assistant>"

CHAT_TEMPLATE = """\
{% for message in messages %}
<{{ message['role'] }}>{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<assistant>
{% endif %}"""


def byte_level_tokenizer(vocab_size: int = 400) -> Tokenizer:
    """Byte-level BPE, as the Llama-3 tokenizer is: tokens may end in the middle of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def tiny_model(
    *,
    context: int = 256,
    layers: int = 2,
    eos: int | tuple[int, ...] | None = 0,
    chat: bool = False,
    seed: int = 0,
) -> BitNet:
    """A packed random model whose weights are large enough for texts that do not go in circles at once."""
    tokenizer = byte_level_tokenizer()
    config = BitNetConfig(
        vocab_size=tokenizer.get_vocab_size() + 5,  # published models have ids without a token, too
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=eos,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    model = pack(BitNet(config, BitLinearQAT)).eval()
    assert isinstance(model, BitNet)
    model.tokenizer = tokenizer
    model.chat_template = CHAT_TEMPLATE if chat else None
    return model


def assert_greedy(model: BitNet, prompt: list[int], new: list[int]) -> None:
    """Every new token is the best one by a forward pass over the whole text, without a cache.

    Exactly, because logits are the same bits with a cache and without, alone and in a batch.
    """
    with torch.no_grad():
        logits = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
    assert logits.argmax(dim=1).tolist() == new
