"""What a training step computes, as shapes: the layers of a model and the lengths of its samples. Imports no torch."""

from dataclasses import dataclass, replace

from common.errors import BadInput


@dataclass(frozen=True)
class Attention:
    """Scores of `queries` x `keys` positions per sample."""

    queries: int
    keys: int
    causal: bool


@dataclass(frozen=True)
class Block:
    """`count` equal transformer layers."""

    count: int
    tokens: int  # positions per sample that pass through the layer
    hidden: int
    heads: int
    inner: int  # heads x head size
    kv_inner: int  # heads of keys and values x head size
    ffn: int
    gated: bool  # an MLP of three matrices
    attention: tuple[Attention, ...]  # of a decoder layer of an encoder-decoder: over itself, then over the encoder

    @property
    def parameters(self) -> int:
        """Of one layer, matrices only."""
        attention = 2 * self.hidden * (self.inner + self.kv_inner)
        return attention * len(self.attention) + (3 if self.gated else 2) * self.hidden * self.ffn


@dataclass(frozen=True)
class Workload:
    """What a step computes per sample."""

    blocks: tuple[Block, ...]
    vocab: int
    logit_tokens: float  # positions per sample for which logits are computed
    head_matrices: int = 0  # parameters of the output head other than the vocabulary's, such as BERT's dense layer
    tied: bool = True  # input and output embedding are one matrix
    # parameters before the first layer and after the last one, a tied embedding in both: for the stages of DeepSpeed's pipeline
    ends: tuple[int, int] | None = None

    @property
    def hidden(self) -> int:
        return self.blocks[0].hidden

    @property
    def layers(self) -> int:
        return sum(block.count for block in self.blocks)

    def sizes(self, parameters: int) -> tuple[int, ...]:
        """Parameters of the embedding, of each layer, and of the output, where all layers are equal and the model has
        `parameters`, tied ones counted once. Their sum counts tied ones twice. BadInput if the model does not tell them."""
        if self.ends is None:
            raise BadInput("deepspeed.pp: the stages of this model are not planned, as its workload gives no `ends`")
        of_layers = parameters + self.vocab * self.hidden * self.tied - sum(self.ends)
        return (self.ends[0], *(self.layers * (of_layers // self.layers,)), self.ends[1])

    @property
    def body(self) -> int:
        """Parameters of all layers."""
        return sum(block.count * block.parameters for block in self.blocks)

    @property
    def parameters(self) -> int:
        return self.body + self.head_matrices + self.vocab * self.hidden * (1 if self.tied else 2)

    def flops(self, causal: bool = False, recomputed: bool = False) -> float:
        """FLOPs per sample, forward and backward, of matrix products and attention (arXiv:2205.05198, appendix A).

        causal: count half of a causal attention. recomputed: count the layers' forward pass twice (PTD-P, eq. 3).
        """
        layers = 0.0
        for block in self.blocks:
            pairs = sum(a.queries * a.keys * (0.5 if causal and a.causal else 1.0) for a in block.attention)
            products = sum(m * n * k for m, n, k in products_of(block, 1))
            layers += block.count * (2.0 * products + 4.0 * block.inner * pairs)
        head = 2.0 * (self.vocab * self.hidden + self.head_matrices) * self.logit_tokens
        return layers * (4 if recomputed else 3) + head * 3


def share_of_sequence(work: Workload, ranks: int) -> Workload:
    """What one of `ranks` that share each sequence computes: its part of the positions, as queries of the keys of all."""
    if ranks == 1:
        return work
    blocks = [
        replace(
            block, tokens=block.tokens // ranks,
            attention=tuple(replace(one, queries=one.queries // ranks) for one in block.attention),
        )
        for block in work.blocks
    ]  # fmt: skip
    return replace(work, blocks=tuple(blocks), logit_tokens=work.logit_tokens / ranks)


def products_of(block: Block, t: int) -> list[tuple[int, int, int]]:
    """(tokens per sample, outputs, inputs) of a layer's linear layers on one of t tensor-parallel ranks.

    Query, key and value are one product. Attention over an encoder projects keys and values of the encoder's positions.
    """
    tokens, h, inner, kv = block.tokens, block.hidden, block.inner // t, max(1, block.kv_inner // t)
    _, *cross = block.attention
    shapes = [(tokens, inner + 2 * kv, h), (tokens, h, inner)]
    for one in cross:
        shapes += [(tokens, inner, h), (one.keys, 2 * kv, h), (tokens, h, inner)]
    return [*shapes, (tokens, (2 if block.gated else 1) * block.ffn // t, h), (tokens, h, block.ffn // t)]
