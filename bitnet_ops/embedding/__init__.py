"""Vectors of texts.

tokens.py             from a text to token ids, cut to the length that fits
mixin.py              `BitNet.embed`: batches, pooling, normalisation
sentence_encoder.py   `SentenceEncoder`: the same as users of sentence-transformers know it
"""
