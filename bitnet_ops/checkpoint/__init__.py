"""Checkpoints: models as folders on disk.

load.py         the order of the checks, and the model
projections.py  what the next two have in common
hf.py           weights in the published Hugging Face formats (packed, ternary, master)
packed.py       weights in our own format, and save_pretrained
config_json.py  config.json
text_files.py   tokenizer, chat template, generation defaults
files.py        JSON and safetensors files, not trusted
head_copy.py    the head's copy for certified tokens
mapped_file.py  a file as memory
write.py        a safetensors file that is fast to map
codes.py        the check of packed weights
errors.py       CheckpointError
"""

from .errors import CheckpointError
from .load import load
from .packed import save_pretrained

__all__ = ["CheckpointError", "load", "save_pretrained"]
