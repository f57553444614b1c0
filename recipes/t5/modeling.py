"""The `transformers` classes that the baseline and DeepSpeed train."""

from transformers import T5ForConditionalGeneration


class Tied(T5ForConditionalGeneration):
    """T5 1.0: the output weights are the embedding's."""


class Untied(T5ForConditionalGeneration):
    """T5 1.1: separate output weights. transformers 5 ties them at construction whatever the configuration says. An
    export holds both weights, and transformers loads it untied."""

    _tied_weights_keys = {
        name: source for name, source in T5ForConditionalGeneration._tied_weights_keys.items() if name != "lm_head.weight"
    }
