"""What common/ asks of a recipe: the functions and names of its family module, its model section and its datasets.

A family module is `recipes/FAMILY/task.py` for pretraining or `recipes/FAMILY/finetune.py` for finetuning. Both offer `Family`.
The stacks' scripts call more of their own family (its loss, for example); common/ calls no more than what stands here. Each
script passes its module to common.preflight.prepare, where mypy checks it against these classes.

`Any` stands for a family's own type, `Model`, `ResolvedModel` or `Config`, which each module names in its signatures.
Letters in shapes: B samples of a micro batch, P parts of the loss.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from common.config import Config as BaseConfig
    from common.data.batches import MicroBatch
    from common.launch.processes import Ranks
    from common.planning.memory import Traits
    from common.planning.workload import Workload
    from common.preflight import Run
    from common.training.finetuning import Results
    from common.training.init import Source


class Corpus(Protocol):
    """Where samples come from: an indexed corpus (common/data/indexed_dataset.py) or the texts of a task
    (common/data/examples.py)."""

    prefix: str  # for messages

    @property
    def manifest(self) -> Mapping[str, Any]:
        """`tokenizer_size` and what else is recorded of the corpus; empty for a corpus of Megatron's own tool."""

    @property
    def tokenizer_dir(self) -> Path | None: ...

    @property
    def tokenizer_hash(self) -> str | None: ...

    @property
    def max_token_id(self) -> int: ...


class Dataset(Protocol):
    """The samples of a run, numbered 0, 1, 2, ... over all its steps. Which sample has a number depends on the seed alone.

    A training dataset has no end: each pass over its samples is a new permutation. A validation dataset has `len` samples.
    """

    vocab_size: int | None  # of the model, once `limit_ids` has set it
    notes: list[str]  # what a user should know of the samples, for example how many were cut

    @property
    def corpora(self) -> Sequence[Corpus]: ...

    @property
    def content_hash(self) -> str:
        """sha256 (hex) of the contents, whatever their files are called."""

    @property
    def unit(self) -> str:
        """What `len` counts, in the plural: 'samples', 'examples'."""

    def __len__(self) -> int:
        """Samples of one pass."""

    def verify(self) -> None:
        """Compare the files with their checksums. BadInput for a corpus that has changed."""

    def limit_ids(self, vocab_size: int | None, key: str) -> None:
        """From now on reading a token id of `vocab_size` or more is BadInput, which names the config's `key`."""

    def where(self, number: int) -> str:
        """File and place of sample `number`, for messages."""

    def batch_order(self, numbers: range) -> np.ndarray:
        """The sample numbers of one step, (n,) int64, in the order in which micro batches take them: as they are, or by length
        so that a micro batch holds little padding. A function of `numbers` alone."""

    def collate(self, numbers: Any) -> "MicroBatch":
        """The samples of these numbers (B,) as arrays whose first dimension is B. Among them `lengths` (B,) int64: tokens
        without padding; and each array of targets that count, (B, ...) bool, has a name that ends in `_mask`."""


class Model(Protocol):
    """The section `model` of a config, as written: keys with a default may be None."""

    def problems(self) -> Iterator[str]:
        """Contradictions between its keys, one line each."""

    def data_problems(self, data: Any) -> Iterator[str]:
        """Contradictions with the section `data`."""

    def phase_problems(self, before: Any, after: Any) -> Iterator[str]:
        """What a later phase, whose section `data` is `after`, may not change of `before`, that of the first phase."""

    def layout_problems(self, cfg: Any, stack: str) -> Iterator[str]:
        """Layouts that the model cannot have on `stack`, one line each, with the reason."""

    def resolve(self, cfg: Any, tokenizer_size: int | None) -> "ResolvedModel":
        """The same with every default filled in. BadInput where there is neither model.vocab_size nor a tokenizer."""


class ResolvedModel(Model, Protocol):
    """The section `model` with no key left open: what config.yaml of a run holds. A family's own shapes stand beside these."""

    arch: Any
    layers: int
    hidden: int
    vocab_size: int
    dropout: float

    def parameter_count(self) -> int:
        """Parameters, each tied weight once."""

    def traits(self) -> "Traits":
        """What takes memory in the layers."""

    def workload(self, data: Any) -> "Workload":
        """The layers and lengths from which common/planning estimates memory and predicts the time of a step."""


class Family(Protocol):
    """A family module. Errors: BadInput (common/errors.py), one line per problem."""

    __name__: str
    FAMILY: str  # the name of the module's folder: a copied recipe is another family

    @property
    def HF_MODEL_TYPES(self) -> tuple[str, ...]:
        """`model_type` in config.json of the Hugging Face folders that it reads."""

    # ---- config and data

    @property
    def Config(self) -> "type[BaseConfig]":
        """The schema of its configs."""

    @property
    def ResolvedConfig(self) -> "type[BaseConfig]":
        """The schema of config.yaml in OUT: the same with every key of `model` given."""

    @property
    def ResolvedModel(self) -> type[Any]:
        """The class of its section `model`."""

    def dataset(self, cfg: Any, data: Any, /, shuffle: bool, stack: str = "baseline") -> Dataset:
        """Open data.train (shuffle) or data.valid. data: as in the config: a blend of corpora, in finetuning the name of a
        split. stack: the one that reads the samples; its layout may need samples of one length. BadInput for a file, a
        tokenizer or a sample that cannot be used; Missing for files that are not there."""

    def make_batch(self, micro_batch: "MicroBatch", device: Any, /) -> "dict[str, torch.Tensor]":
        """A micro batch of `dataset` as tensors on `device`."""

    # ---- the model, by Hugging Face names; `model` is resolved

    def hf_config(self, model: Any, /) -> "PreTrainedConfig":
        """The configuration of the transformers class that is trained."""

    def hf_model(self, model: Any, /) -> "PreTrainedModel":
        """The transformers model that the baseline and DeepSpeed train."""

    def hf_model_type(self, model: Any, /) -> str:
        """`model_type` in config.json of an export."""

    def hf_class_name(self, model: Any, /) -> str:
        """The transformers class that loads an export."""

    def hf_config_overrides(self, model: Any, /) -> dict[str, Any]:
        """The keys of an export's config.json whose values differ from those of `hf_config`."""

    def parameter_shapes(self, model: Any, /) -> dict[str, tuple[int, ...]]:
        """{name: full shape} of every parameter, each tied weight once. Needs torch."""

    def parameter_patterns(self, model: Any, /) -> dict[str, tuple[int, ...]]:
        """The same without torch: `*` stands for the number of a layer."""

    def layer_count(self, model: Any, pattern: str, /) -> int:
        """How many layers the `*` of a pattern counts."""

    def initializer(self, model: Any, name: str, /) -> float | str:
        """The first value of a parameter: 'zeros', 'ones', or the standard deviation of a normal distribution of mean 0."""

    def has_weight_decay(self, name: str, /) -> bool:
        """Does weight decay apply to this parameter?"""

    def forward_backward_flops(self, model: Any, data: Any, /) -> dict[str, float]:
        """FLOPs per token, forward and backward, without recomputation: `full`, and, for causal attention, `causal`, which
        leaves out the masked half of the pairs."""

    def model_card(self, model: Any, /) -> dict[str, Any]:
        """What the export's model card says of the architecture."""

    # ---- Hugging Face folders to begin from (common/huggingface/hf_folder.py); torch-free

    @property
    def IGNORED_HF_KEYS(self) -> Mapping[str, str]:
        """Keys of config.json that change no output -> the reason."""

    @property
    def IGNORED_HF_HEADS(self) -> tuple[str, ...]:
        """Prefixes of heads that a folder may hold though the model has no such head."""

    @property
    def HF_BUFFER_PATTERNS(self) -> tuple[str, ...]:
        """Regular expressions of a folder's tensors that are not parameters."""

    def normalized_hf_config(self, values: dict[str, Any], /) -> dict[str, Any]:
        """A transformers configuration with one spelling for values that mean the same."""

    def stored_names(self, name: str, /) -> list[str]:
        """The names under which a folder may hold a parameter. The first one that exists counts."""

    def duplicate_names(self, model: Any, /) -> dict[str, str]:
        """Names under which a folder may repeat a tied parameter -> that parameter."""

    def optional_prefixes(self, model: Any, /) -> tuple[str, ...]:
        """Prefixes of the heads that a folder may lack: they are initialized from the seed."""

    def new_head_prefixes(self, model: Any, /) -> tuple[str, ...]:
        """Prefixes of the heads that are initialized from the seed though the folder may hold them."""

    def head_problems(self, cfg: Any, shapes: Mapping[str, Sequence[int]], stored: dict[str, Any], /) -> Iterator[str]:
        """What is wrong with the head in a folder whose tensors have these shapes and whose config.json is `stored`."""

    def head_notes(self, cfg: Any, shapes: Mapping[str, Sequence[int]], stored: dict[str, Any], /) -> Iterator[str]:
        """What a user should know of a head without problems."""

    def reorder_labels(self, cfg: Any, folder: Path, source: "Source", /) -> "Source":
        """`source`, which reads the parameters of a folder, with the outputs of the head in the order of the task's labels."""


class FamilyOf[C: BaseConfig](Family, Protocol):
    """A family whose runs have a config of type C. With it mypy knows the type of the config in each script."""

    @property
    def ResolvedConfig(self) -> type[C]: ...


class PretrainingFamily(Family, Protocol):
    """What only `task.py` has: names that scripts/heldout.py and the commands of convert.py need."""

    def export_loss_sums(self, net: Any, batch: "dict[str, torch.Tensor]", /) -> "tuple[torch.Tensor, torch.Tensor]":
        """The summed losses (P,) and the numbers of targets (P,) of an export in plain transformers on a batch, in fp32."""

    def model_from_hf_config(self, config: dict[str, Any], /) -> Any:
        """The resolved section `model` for a folder's config.json. KeyError where it lacks a shape."""


class FinetuningFamily(Family, Protocol):
    """What only `finetune.py` has: how checkpoints are compared, what happens before the first step and after the export."""

    def selection_metric(self, cfg: Any, /) -> str:
        """The metric that decides which checkpoint is the best: `loss`, or a key of `validation_metrics`."""

    def validation_metrics(self, run: "Run", predictions: Any, /) -> dict[str, float]:
        """The metrics of an evaluation besides its loss, from predictions (n, width)."""

    def best_results(self, run: "Run", loss: float, n: int, predictions: Any, /) -> "Results | None":
        """What rank 0 writes to OUT for the best evaluation so far, whose mean loss is over n targets; None: nothing."""

    def before_start(self, run: "Run", /) -> None:
        """Rank 0, before the first step, once OUT is the run's: what it adds to OUT/tokenizer."""

    def after_export(self, run: "Run", ranks: "Ranks", /) -> None:
        """All ranks, after OUT/hf is written: what the best checkpoint generates."""
