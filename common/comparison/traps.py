"""Silent traps: what a stack or a library gets wrong, or does unasked, without a word. Each was met here, and a test holds it.

Versions: deepspeed 0.19.8, megatron-core 0.19.2, transformers 5.23.0, torch 2.15.0.
"""

from typing import NamedTuple


class Trap(NamedTuple):
    owner: str  # deepspeed, megatron, or libraries: what all stacks use
    name: str  # a row of a table
    silent: str  # what happens without a word
    test: str  # the one that fails if a recipe falls into it
    guard: tuple[str, str]  # (file, words): where the recipes avoid it


PARITY = "tests/test_parity.py::test_follows_the_reference_loop"
TRAPS: tuple[Trap, ...] = (
    Trap(
        "deepspeed",
        "clipping in a pipeline",
        "at ZeRO 0 the norm counts a tied embedding twice, and clips too much",
        "tests/test_bad_input.py::test_layouts",
        ("common/config.py", "DeepSpeed then counts a tied embedding twice"),
    ),
    Trap(
        "deepspeed",
        "Ulysses at stage 3",
        "gradients come out divided by sp, which Adam hides until they are clipped",
        f"{PARITY}[zero3_sp2-tiny]",
        ("recipes/gpt/deepspeed/pretrain.py", "averaging_ranks"),
    ),
    Trap(
        "deepspeed",
        "masks under Ulysses",
        "UlyssesSPAttentionHF drops the attention mask: documents see each other",
        "tests/test_parity.py::test_unequal_targets_follow_the_reference_loop",
        ("common/stacks/attention.py", "deepspeed's UlyssesSPAttentionHF would drop it"),
    ),
    Trap(
        "deepspeed",
        "Ulysses and other models",
        "it replaces transformers' sdpa for every model of the process",
        f"{PARITY}[zero1_sp2-tiny]",
        ("common/stacks/attention.py", "as deepspeed's UlyssesSPAttentionHF would do"),
    ),
    Trap(
        "deepspeed",
        "bf16 without ZeRO",
        "accumulates gradients in bf16: the loss is 30 times as far from fp32 as at stage 1",
        "tests/test_parity.py::test_bf16_stays_near_fp32",
        ("common/stacks/zero.py", "accumulates a bf16 model's gradients in bf16"),
    ),
    Trap(
        "deepspeed",
        "dropout under AutoTP",
        "ranks with different heads drop the same scores",
        "tests/test_zero.py::test_ranks_drop_different_scores_and_go_on_with_equal_generators",
        ("common/stacks/attention.py", "Draw other numbers than the other ranks"),
    ),
    Trap(
        "deepspeed",
        "tied output under AutoTP",
        "is split over the vocabulary, and its loss is computed by another function",
        "tests/test_parity.py::test_autotp_leaves_a_tied_output_whole",
        ("common/stacks/zero.py", '"vocab_parallel_lm_head": False'),
    ),
    Trap(
        "deepspeed",
        "export under AutoTP",
        "save_16bit_model writes the first rank's shards alone (ZeRO 0 and 1), and returns True",
        "tests/test_resume.py::test_every_move_reads_back_bit_for_bit",
        ("common/stacks/zero.py", "elements of this rank's AutoTP shard"),
    ),
    Trap(
        "deepspeed",
        "random state",
        "is in no checkpoint: with dropout, a continued run is another one",
        "tests/test_resume.py::test_two_halves_are_one_run_bit_for_bit",
        ("common/launch/processes.py", "seed_micro_batch"),
    ),
    Trap(
        "deepspeed",
        "round_robin_gradients",
        "should change nothing; the losses of ZeRO 1 and 2 part at the second step",
        "tests/test_extra.py::test_what_changes_the_loss_or_is_not_read_is_refused",
        ("common/stacks/extra.py", "with `round_robin_gradients`"),
    ),
    Trap(
        "deepspeed",
        "relative biases under AutoTP",
        "T5's are sliced without a mark: their gradients are missing in the norm",
        "tests/test_t5_parity.py::test_follows_the_reference_loop",
        ("common/stacks/zero.py", "AutoTP slices embeddings (T5's relative biases) without saying so"),
    ),
    Trap(
        "megatron",
        "weight decay",
        "biases and norms decay too: wd_mult is applied by Megatron's own scheduler alone",
        PARITY,
        ("common/stacks/mcore.py", "wd_mult is 0 for biases and norms"),
    ),
    Trap(
        "megatron",
        "logged loss",
        "the schedule divides it in place by the number of micro batches",
        PARITY,
        ("recipes/gpt/megatron/pretrain.py", "a copy, since the schedule divides in place"),
    ),
    Trap(
        "megatron",
        "unknown token ids",
        "with tp above 1, ids above the vocabulary are masked and trained on",
        "tests/test_corpus.py::test_every_stack_stops_at_unknown_ids_and_flipped_bits",
        ("tests/test_corpus.py", "would mask them and train on"),
    ),
    Trap(
        "megatron",
        "interleaved stages on gloo",
        "batched sends of two stages swap: the loss is off by 0.12",
        f"{PARITY}[pp2_vpp2-tiny]",
        ("common/stacks/mcore.py", "batch_p2p_comm"),
    ),
    Trap(
        "megatron",
        "what is installed",
        "an importable TransformerEngine or Apex changes AdamW, clipping and norms unasked",
        "tests/test_mcore.py::test_installed_transformer_engine_and_apex_change_nothing",
        ("common/stacks/mcore.py", "Replace what Megatron takes unasked from TransformerEngine or Apex"),
    ),
    Trap(
        "megatron",
        "T5 without extensions",
        "has no final norm, no scaling of the logits and a bias in its tied head",
        "tests/test_t5_convert.py::test_logits_equal_transformers",
        ("recipes/t5/megatron/model.py", "has no relative biases, no final norm, a bias in the tied head"),
    ),
    Trap(
        "megatron",
        "fused GELU",
        "bias_activation_fusion computes the tanh form where the model asks for the exact one",
        "tests/test_bert_convert.py::test_logits_equal_transformers",
        ("recipes/bert/megatron/model.py", "activation_func=F.gelu"),
    ),
    Trap(
        "megatron",
        "dead fields",
        "of TransformerConfig are accepted, and no layer that is built reads them",
        "tests/test_extra.py::test_its_stack_reads_each_key_where_it_is_said_to",
        ("common/stacks/extra.py", "nothing would say that they had no effect"),
    ),
    Trap(
        "megatron",
        "distributed optimizer",
        "after loading, all parameters share one step counter: Adam's bias correction drifts",
        "tests/test_resume.py::test_two_halves_are_one_run_bit_for_bit",
        ("common/stacks/mcore.py", "does\nnot load a distributed optimizer over torch's AdamW"),
    ),
    Trap(
        "megatron",
        "dropout of stages and parts",
        "seeded as Megatron Core offers, stages and context-parallel ranks draw the same units",
        "tests/test_context_parallel.py::test_on_two_ranks",
        ("common/stacks/mcore.py", "so that no two chunks or ranks"),
    ),
    Trap(
        "libraries",
        "T5 1.1 in transformers",
        "its output weights are tied at construction whatever the configuration says",
        "tests/test_t5_convert.py::test_exports_load_untied_and_write_the_same_text",
        ("recipes/t5/modeling.py", "transformers 5 ties them at construction"),
    ),
    Trap(
        "libraries",
        "padding_idx in BERT",
        "the embedding's gradient of that id is dropped, wherever the id occurs",
        "tests/test_bert_parity.py::test_follows_the_reference_loop",
        ("recipes/bert/task.py", "Otherwise the classes would drop the gradient of that id"),
    ),
    Trap(
        "libraries",
        "means of means",
        "BERT and T5 ignore num_items_in_batch: micro batches of unequal targets weigh the same",
        "tests/test_bert_parity.py::test_follows_the_reference_loop",
        ("CONTRIBUTING.md", "mean over its own targets"),
    ),
    Trap(
        "libraries",
        "torch's cross entropy",
        "adds up a large vocabulary too low on a CPU: 1.9e-5 at 49,152 ids",
        "tests/test_loss.py::test_equals_fp64",
        ("tests/test_loss.py", "F.cross_entropy in fp32 is 2.5e-6 too low"),
    ),
    Trap(
        "libraries",
        "torch's norm of gradients",
        "too low on a CPU if a tensor is large: 6e-5 at 3 million values, 3e-3 at 40 million",
        "tests/test_parity.py::test_large_gradients_are_clipped_by_their_norm",
        ("common/training/optim.py", "the norm is too low by 1e-5 of itself at a million values"),
    ),
    Trap(
        "libraries",
        "torch.compile",
        "the ninth graph of a function is the plain function, with other dropout",
        "tests/test_compile.py::test_layers_of_one_class_share_a_graph",
        ("common/training/compiling.py", "By default the ninth would be the plain function, in silence"),
    ),
    Trap(
        "libraries",
        "numbers in YAML 1.1",
        "010 is read as 8, and 1:30 as 90",
        "tests/test_bad_input.py::test_keys_and_values",
        ("tests/test_bad_input.py", "YAML 1.1 reads in silence as others"),
    ),
)
