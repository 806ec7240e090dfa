"""The CUDA streams that gradients are produced on, of which a backward may have several."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Producers:
    """By index of a parameter, the stream that has last added to its gradient."""

    def __init__(self) -> None:
        self._streams: dict[int, torch.cuda.Stream] = {}

    def note(self, index: int, parameter: Tensor) -> None:
        """The current stream has added to the gradient."""
        if parameter.is_cuda:
            self._streams[index] = torch.cuda.current_stream(parameter.device)

    def wait_for(self, gradients: Mapping[int, Tensor]) -> None:
        """Let the current stream read ``gradients`` after they are there (DeepSpeed#8061).

        They may be freed before it has: their memory is not given to others until then.
        """
        for index, gradient in gradients.items():
            if (stream := self._streams.pop(index, None)) is None:
                continue
            here = torch.cuda.current_stream(stream.device)
            if stream != here:
                here.wait_stream(stream)
                is_dense = gradient.layout is torch.strided
                for part in [gradient] if is_dense else [gradient._indices(), gradient._values()]:
                    part.record_stream(here)
