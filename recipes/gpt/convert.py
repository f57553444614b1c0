"""Convert runs of GPT to Hugging Face folders, and Hugging Face folders to runs.

python -m recipes.gpt.convert to-hf RUN HF_DIR      the last checkpoint of a run of any stack, in Hugging Face form
python -m recipes.gpt.convert from-hf HF_DIR OUT    a run's starting point from a Hugging Face folder, for any stack
"""

from functools import partial

from common.errors import exit_cleanly, require_environment

if __name__ == "__main__":
    require_environment()
    from common.huggingface import interchange

    from . import task

    exit_cleanly(partial(interchange.main, task))
