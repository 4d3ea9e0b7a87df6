"""Writes a model with its weights rounded to 4 bits: does rounding move what the experiments find?

The known models are 4-bit files, dequantised. So their weights are rounded once more, in another
format: Q4_0, blocks of 32 weights with one scale and no offset. A finding that this moves hangs on
the rounding of the weights as well.

    python -m benchmarks.rounded smollm2-135m rounded/
    pytest test_experiments -k exp16 --model rounded/
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import tempo

BLOCK = 32


def rounded(weights: Tensor) -> Tensor:
    """The weights after Q4_0: of each block of 32 the largest becomes -8 or 8 steps of 16.

    >>> rounded(torch.tensor([[-8.0, 7.4, 0.6, 0.0] * 8]))[0, :4].tolist()
    [-8.0, 7.0, 1.0, 0.0]
    """
    blocks = weights.reshape(-1, BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scale = largest / -8
    steps = torch.where(scale == 0, 0.0, blocks / scale).round().clamp(-8, 7)
    return (steps * scale).reshape(weights.shape)


@torch.inference_mode()
def round_all(model: nn.Module) -> float:
    """Round every matrix whose rows are whole blocks; returns the mean relative change."""
    changes = []
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[-1] % BLOCK == 0:
            new = rounded(parameter.float()).to(parameter)
            changes.append(float((new - parameter).norm() / parameter.norm()))
            parameter.copy_(new)
    return sum(changes) / len(changes)


def main() -> None:
    """Load, round, save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a known model, a folder, a .gguf file or a hub id")
    parser.add_argument("folder", type=Path, help="where the rounded model is written")
    arguments = parser.parse_args()
    lm = tempo.load_model(arguments.model)
    assert lm.tokenizer is not None
    change = round_all(lm.model)
    lm.model.save_pretrained(arguments.folder)
    lm.tokenizer.save_pretrained(arguments.folder)
    print(f"{lm.name}, its weights changed by {change:.1%}, is in {arguments.folder}")


if __name__ == "__main__":
    main()
