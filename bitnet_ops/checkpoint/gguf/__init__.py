"""GGUF: a model in one file, as llama.cpp, bitnet.cpp and their relatives write it.

types.py          the table of tensor types: numbers, names, bytes
ternary/          bytes to ternary weights and scales, and back
dense/            bytes to floats, and back
cursor.py         what a header consists of, bounds-checked
header.py         what a file's header says, not trusted
names.py          what tensors are called
architectures.py  what is known: architectures, keys of settings
settings.py       metadata to `DecoderConfig`
rope.py           how the rotary embedding is stretched
text.py           ids of special tokens, chat template
tokenizer.py      metadata to a tokenizer, and back
token_list.py     the list of its tokens
byte_level.py     byte-level BPE
pre_tokenizers.py  how it cuts texts
sentencepiece.py  SentencePiece BPE
floats.py         float32 to the decimals that people wrote
matrix.py         one matrix, in the model's order of rows
weights.py        a model's weights
open.py           a file, open and checked
write.py          writes a file
export.py         a model as metadata and tensors
settings_out.py   `DecoderConfig` to metadata
scales_out.py     a model's scales as a type has them
"""
