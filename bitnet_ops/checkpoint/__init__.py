"""Checkpoints: models as folders and files.

load.py           the order of the checks, and the model
location.py       what users name a model by, and where it lies
hub.py            models from the Hugging Face hub
opened.py         what there is to know before weights are read
pieces.py         loops over pieces that stay in a core's cache
folder.py         a folder in the Hugging Face layout
config_json.py    config.json
body.py           what only the names of tensors say
text_files.py     tokenizer, chat template, generation defaults
pooling.py        embeddings, in the files of sentence-transformers
weights.py        what the formats of weights have in common
hf.py             weights in the published "bitnet" formats (packed, ternary, master)
quarters.py       how those are packed
ternary_floats.py float weights that are ternary already: their scales are found
mlx.py            weights in MLX's 2-bit form
group_sizes.py    which inputs of a row share a scale
gguf/             GGUF files, read and written
packed.py         weights in our own format, and save_pretrained
published_out.py  writes the published layout, for transformers
saveable.py       what a model has to be to be written
draft.py          files that are written as a whole or not at all
tensor_source.py  tensors by name, mapped or read
files.py          JSON and safetensors files, not trusted
head_copy.py      the head's copy for certified tokens
mapped_file.py    a file as memory
write.py          a safetensors file that is fast to map
codes.py          the check of packed weights
errors.py         CheckpointError
"""

from .errors import CheckpointError
from .gguf.export import save_gguf
from .load import load
from .packed import save_pretrained
from .published_out import save_published

__all__ = ["CheckpointError", "load", "save_gguf", "save_pretrained", "save_published"]
