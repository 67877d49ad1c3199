"""Slot attention in the usual order, written with einsums: keys and values of all inputs, then T iterations."""

import torch
from torch import Tensor, nn

EPS = 1e-8


class UsualSlotAttention(nn.Module):
    """Locatello et al. 2020, algorithm 1, as it is written down. [B, N, D] -> [B, K, D]"""

    def __init__(self, num_slots: int, dim: int, iters: int = 3, hidden_dim: int = 128) -> None:
        super().__init__()
        self.num_slots, self.dim, self.iters = num_slots, dim, iters
        self.mu, self.log_sigma = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.zeros(1, 1, dim))
        self.to_query, self.to_key, self.to_value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.norm_inputs, self.norm_slots, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))

    def forward(self, inputs: Tensor) -> Tensor:
        noise = torch.randn(len(inputs), self.num_slots, self.dim, device=inputs.device)
        slots = self.mu + self.log_sigma.exp() * noise
        inputs = self.norm_inputs(inputs)
        keys, values = self.to_key(inputs), self.to_value(inputs)
        for _ in range(self.iters):
            queries = self.to_query(self.norm_slots(slots)) * self.dim**-0.5
            attention = torch.einsum("bnd,bkd->bnk", keys, queries).softmax(dim=2) + EPS
            attention = attention / attention.sum(dim=1, keepdim=True)
            updates = torch.einsum("bnk,bnd->bkd", attention, values)
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots
