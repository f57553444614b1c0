"""Hugging Face folders from runs of T5, and runs from Hugging Face folders.

python -m recipes.t5.convert to-hf RUN HF_DIR      the last checkpoint of a run of any stack, in Hugging Face form
python -m recipes.t5.convert from-hf HF_DIR OUT    a run's starting point from a Hugging Face folder, for any stack
"""

from functools import partial

from common.errors import exit_cleanly
from common.huggingface import interchange

from . import task

if __name__ == "__main__":
    exit_cleanly(partial(interchange.main, task))
