"""A child forked after the library has used its threads works, as PyTorch's DataLoader needs."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import flashdelta
from reference import inputs


class Outputs(Dataset[Tensor]):
    """Runs the library where items are made: in the workers."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, seed: int) -> Tensor:
        *main, _ = inputs(T=130, seed=seed)
        return flashdelta.chunk_gated_delta_rule(*main)[0]


def test_dataloader_workers_after_a_call() -> None:
    expected = torch.stack([Outputs()[i] for i in range(4)])
    leaves = [t.requires_grad_() for t in inputs(T=130)]
    flashdelta.chunk_gated_delta_rule(*leaves[:5])[0].sum().backward()
    loader = DataLoader(Outputs(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)
