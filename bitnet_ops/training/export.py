"""From trained float weights to a packed folder with a model card."""

from pathlib import Path

import torch

from ..checkpoint import save_pretrained
from ..decoder.config import DecoderConfig
from ..layers.replace import pack
from .card import model_card
from .corpus import Corpus
from .loop import HeldOut, TrainOptions, TrainResult, evaluate

SAMPLE_TOKENS = 200

GENERATION = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95}
"""How a story model likes to be sampled: the unlikely tail of a small model is mostly mistakes."""


def export(
    text: Path,
    config: DecoderConfig,
    corpus: Corpus,
    options: TrainOptions,
    result: TrainResult,
    folder: Path,
    *,
    progress: bool = False,
) -> dict[str, HeldOut]:
    """Packs the best weights of a run into a folder that `from_pretrained` loads.

    ``result.model`` itself is packed, so its float weights are gone afterwards.

    Returns:
        The losses of the packed model, by part of the corpus.
    """
    model = result.model.cpu()
    pack(model)
    # The head reads the whole embedding for every token, so its bytes are time: bfloat16, as in 2B4T.
    model.model.embed_tokens.to(torch.bfloat16)
    model.eval()
    model.tokenizer = corpus.tokenizer
    model.generation_config = dict(GENERATION)
    losses = {
        name: evaluate(model, split, options.sequence_length, progress=progress)
        for name, split in (("validation", corpus.validation), ("test", corpus.test))
    }
    prompt = torch.tensor([corpus.tokenizer.encode("").ids])
    room = config.max_position_embeddings - prompt.shape[1]
    ids = model.generate(prompt, max_new_tokens=min(SAMPLE_TOKENS, room), seed=0)
    sample = corpus.tokenizer.decode(ids[0].tolist())
    save_pretrained(model, folder)
    card = model_card(text, config, corpus, options, result, losses, sample)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return losses
