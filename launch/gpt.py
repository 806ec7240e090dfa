"""A GPT over bytes: the model that ``train.py`` trains.

Nothing here knows of ranks or optimizers: serving any plain ``nn.Module`` is the point of the job.

No linear layer or norm has a bias. It saves parameters, and it spares a trap to whoever compares
runs: the gradient of a key bias is zero in theory and rounding noise in practice, and Adam scales
that noise up to steps of full size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_BYTES = (
    256  # the vocabulary: text enters and leaves as bytes, so no tokenizer has to be trained
)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width) -> the same
        batch, time, width = x.shape
        heads = self.query_key_value(x).view(batch, time, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, head, time, head width)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(mixed.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """Attention, then a feed-forward layer; each reads a normed copy of ``x`` and adds to it."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, num_heads)
        self.expand_norm = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.project = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width) -> the same
        x = x + self.attention(self.attention_norm(x))
        return x + self.project(functional.gelu(self.expand(self.expand_norm(x))))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out.

    The embedding of bytes is also the output layer, so that the optimizer meets a parameter that
    is used twice; not so where embeddings have sparse gradients.

    Args:
        num_layers: number of blocks.
        num_heads: attention heads of a block; divides ``width``.
        width: channels of the residual stream.
        context: the longest window that the model reads, in bytes.
        sparse: whether the gradients of embeddings are sparse.
    """

    def __init__(
        self, *, num_layers: int, num_heads: int, width: int, context: int, sparse: bool = False
    ):
        super().__init__()
        self.byte_embedding = nn.Embedding(NUM_BYTES, width, sparse=sparse)
        self.place_embedding = nn.Embedding(context, width, sparse=sparse)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.output = nn.Linear(width, NUM_BYTES, bias=False) if sparse else None
        self.initialise()

    def initialise(self) -> None:
        """Weights that keep the spread of what they read; a tenth of it where blocks add to ``x``.

        Blocks that begin as small corrections let the model learn pairs of bytes at once, which
        shows in a run of two minutes.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = 0.1 if name.endswith("project.weight") else 1.0
                nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)

    def forward(self, bytes_in: Tensor) -> Tensor:  # (batch, time) -> (batch, time, NUM_BYTES)
        places = torch.arange(bytes_in.shape[1], device=bytes_in.device)
        x = self.byte_embedding(bytes_in) + self.place_embedding(places)
        for block in self.blocks:
            x = block(x)
        last = self.byte_embedding if self.output is None else self.output
        return functional.linear(self.norm(x), last.weight)


def summed_loss(
    logits: Tensor,  # (batch, time, NUM_BYTES)
    bytes_out: Tensor,  # (batch, time)
) -> Tensor:
    """Cross-entropy in nats, summed over all bytes.

    A sum and not a mean: ranks may hold unequal parts of a batch, and only sums add up.
    """
    return functional.cross_entropy(logits.flatten(0, 1), bytes_out.flatten(), reduction="sum")
