"""What alternatives.py compares the recipes with: transformers.Trainer, and a minimal loop over Megatron Core."""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers.trainer_callback import TrainerCallback

from common.checkpoints import parameters, state
from common.contract import PretrainingFamily
from common.launch import processes

if TYPE_CHECKING:
    from common.preflight import Run

Arrays = Mapping[str, np.ndarray]  # the samples of one step, as `task.dataset` assembles them
Step = Callable[[Arrays], float]  # makes one optimizer step on these samples; returns the loss


# ---- transformers.Trainer --------------------------------------------------------------------------------------------


def trainer_fields(arrays: Arrays) -> dict[str, np.ndarray]:
    """The samples of a step as the arguments of the `transformers` class, with -100 for a position that is no target."""
    if "mlm_mask" in arrays:  # masked language model
        mask = np.arange(arrays["tokens"].shape[1]) < arrays["lengths"][:, None]
        fields = {
            "input_ids": arrays["tokens"], "token_type_ids": arrays["token_types"], "attention_mask": mask.astype(np.int64),
            "labels": np.where(arrays["mlm_mask"], arrays["labels"], -100),
        }  # fmt: skip
        return fields | ({"next_sentence_label": arrays["pair_label"]} if "pair_label" in arrays else {})
    if "targets" in arrays:  # encoder-decoder
        mask = np.arange(arrays["inputs"].shape[1]) < arrays["input_lengths"][:, None]
        return {
            "input_ids": arrays["inputs"], "attention_mask": mask.astype(np.int64),
            "labels": np.where(arrays["loss_mask"], arrays["targets"], -100),
        }  # fmt: skip
    inputs = arrays["tokens"][:, :-1]  # the class shifts the labels by one position itself; the first is no target
    labels = np.where(np.arange(inputs.shape[1]) > 0, inputs, -100)
    return {"input_ids": inputs, "labels": labels}


class StepByStep(TrainerCallback):
    """Makes a Trainer, which runs in a thread of its own, wait after each step."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.done.release()
        self.go.acquire()


class RecordingTrainer(transformers.Trainer):
    """A Trainer that reads the samples in their order, and keeps each step's loss.

    loss_of: computes the loss in place of the model, from the model and a batch.
    """

    def __init__(self, *args: Any, loss_of: Callable[[Any, dict[str, Any]], torch.Tensor] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loss_of, self.last_loss = loss_of, torch.zeros(())

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[Any]:
        dataset: Any = self.train_dataset
        return torch.utils.data.SequentialSampler(dataset)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss: Any
        if self.loss_of is None:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            loss = self.loss_of(model, inputs)
        self.last_loss = loss.detach()
        return loss


def trainer(
    run: "Run", task: PretrainingFamily, ds_config: dict[str, Any] | None, arrays: Sequence[Arrays], tuned: bool
) -> Step:
    """transformers.Trainer with the recipe's initial weights, samples and optimizer settings.

    ds_config: DeepSpeed's configuration, to train with DeepSpeed. arrays: the samples of all steps that will be made.
    tuned: with the kernels of the recipes, that is their model class (GELU as one kernel, the MLM head on the masked positions
    only, SDPA in every model) and `F.cross_entropy`. Otherwise as it comes: the class that loads the recipe's export.
    """
    cfg, model_class = run.cfg, getattr(transformers, task.hf_class_name(run.cfg.model))
    net = task.hf_model(cfg.model) if tuned else model_class(task.hf_config(cfg.model))
    set_initial_values(net, run, task)
    samples = [
        {name: torch.as_tensor(rows[i]) for name, rows in fields.items()}
        for fields in map(trainer_fields, arrays)
        for i in range(len(fields["input_ids"]))
    ]
    loop = RecordingTrainer(
        net, arguments(run, len(arrays), deepspeed=ds_config, **({"optim": "adamw_torch_fused"} if tuned else {})),
        train_dataset=samples, loss_of=task_loss if tuned else None,
    )  # fmt: skip
    return step_by_step(loop)


def arguments(run: "Run", steps: int, **more: Any) -> transformers.TrainingArguments:
    """The recipe's settings as those of a Trainer; everything else is as it comes."""
    optim, cuda = run.cfg.optim, torch.cuda.is_available()
    return transformers.TrainingArguments(
        output_dir=str(run.out / "trainer"), per_device_train_batch_size=run.layout.micro_batch, use_cpu=not cuda,
        gradient_accumulation_steps=run.layout.accumulate, max_steps=steps, learning_rate=optim.lr,
        warmup_steps=optim.warmup_steps, weight_decay=optim.weight_decay, adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1], adam_epsilon=optim.eps, max_grad_norm=optim.grad_clip, bf16=run.cfg.train.dtype == "bf16",
        save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=cuda,
        **more,
    )  # fmt: skip


def step_by_step(loop: RecordingTrainer) -> Step:
    """A Trainer, in a thread of its own, that makes one step per call."""
    stepping, failures = StepByStep(), []
    loop.add_callback(stepping)
    threads = torch.get_num_threads()

    def train() -> None:
        torch.set_num_threads(threads)  # per thread
        try:
            loop.train()
        except BaseException as error:
            failures.append(error)
        stepping.done.release()

    thread = threading.Thread(target=train, daemon=True)

    def step(_: Arrays) -> float:
        if thread.ident is None:  # not started yet: two Trainers must not build their engines at the same time
            thread.start()
        else:
            stepping.go.release()
        stepping.done.acquire()
        if failures:
            raise failures[0]
        return float(loop.last_loss)

    return step


def task_loss(model: Any, fields: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss of the recipes' model class, by F.cross_entropy. fields: a batch of trainer_fields."""
    labels = fields["labels"]
    if "token_type_ids" in fields:
        predicted = (labels.flatten() != -100).nonzero()[:, 0]  # (N,)
        mlm, pairs = model(fields["input_ids"], fields["token_type_ids"], fields["attention_mask"].bool(), predicted)
        loss = F.cross_entropy(mlm.float(), labels.flatten()[predicted])
        return loss if pairs is None else loss + F.cross_entropy(pairs.float(), fields["next_sentence_label"])
    if "attention_mask" in fields:
        start = torch.zeros_like(labels[:, :1])  # the decoder starts with the padding id, 0
        shifted = torch.cat([start, labels[:, :-1].clamp(min=0)], 1)
        mask = fields["attention_mask"].bool()[:, None, None, :]
        logits = model(input_ids=fields["input_ids"], attention_mask=mask, decoder_input_ids=shifted).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    logits = model(input_ids=fields["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def set_initial_values(net: torch.nn.Module, run: "Run", task: PretrainingFamily) -> None:
    """Give a `transformers` model the values with which the recipe begins."""
    shapes = parameters.expected(run.cfg.model, task)
    values = state.values(run.cfg, task, shapes, None)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(values(name, shapes[name])["weight"])


# ---- Megatron Core ---------------------------------------------------------------------------------------------------


def minimal_megatron(run: "Run", ranks: processes.Ranks) -> Step:
    """A loop over Megatron Core's GPTModel with the recipe's modules and AdamW kernel, which logs and checks nothing."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from common.stacks import cuda_stand_in, mcore

    m, o = run.cfg.model, run.cfg.optim
    shape = TransformerConfig(
        num_layers=m.layers, hidden_size=m.hidden, num_attention_heads=m.heads, hidden_dropout=0.0, attention_dropout=0.0,
        activation_func=partial(F.gelu, approximate="tanh"), finalize_model_grads_func=finalize_model_grads,
        use_cpu_initialization=True, masked_softmax_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    mcore.use_own_norms()
    net = GPTModel(
        config=shape, transformer_layer_spec=mcore.layer_spec(AttnMaskType.causal), vocab_size=m.vocab_size,
        max_sequence_length=m.positions, share_embeddings_and_output_weights=True,
    )  # fmt: skip
    with cuda_stand_in.active(ranks):
        model = DistributedDataParallel(shape, DistributedDataParallelConfig(), net.to(ranks.device))
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=o.lr, weight_decay=o.weight_decay, adam_beta1=o.betas[0], adam_beta2=o.betas[1],
                adam_eps=o.eps, clip_grad=o.grad_clip,
            ),
            [model], use_gloo_process_groups=False,
        )  # fmt: skip
    for group in optimizer.param_groups:
        group["fused"] = True  # the same kernel as the recipe's
    schedule = get_forward_backward_func()
    positions = torch.arange(run.cfg.data.seq_len, device=ranks.device).expand(run.layout.micro_batch, -1)  # (B, T)

    def forward(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        inputs, targets = next(batches)

        def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            mean = losses.mean()
            return mean, {"loss": mean.detach().clone()}

        return model(inputs, positions, None, labels=targets), loss_of

    model.train()

    def step(arrays: Arrays) -> float:
        tokens = torch.from_numpy(arrays["tokens"]).to(ranks.device)  # (B, T + 1)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        with cuda_stand_in.active(ranks):
            outputs = schedule(
                forward_step_func=forward, data_iterator=iter([(tokens[:, :-1], tokens[:, 1:])]), model=[model],
                num_microbatches=1, seq_length=run.cfg.data.seq_len, micro_batch_size=run.layout.micro_batch,
                forward_only=False,
            )  # fmt: skip
            optimizer.step()
        return outputs[0]["loss"].item()

    return step
