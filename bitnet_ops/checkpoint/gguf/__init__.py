"""GGUF: a model in one file, as llama.cpp, bitnet.cpp and their relatives write it.

types.py      the table of tensor types: numbers, names, bytes
ternary.py    bytes to ternary weights and scales, and back
dense.py      bytes to floats, and back
header.py     what a file's header says, not trusted
settings.py   metadata to `DecoderConfig`, and the names of tensors, by architecture
weights.py    a model's weights
text.py       what metadata says about text: ids, chat template
tokenizer.py  metadata to a tokenizer, and back
open.py       a file, open and checked
write.py      writes a file
export.py     a model as metadata and tensors
"""
