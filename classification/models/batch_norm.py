"""Batch normalisation over the batches of all ranks, on any device and in a compiled graph."""

import torch
import torch.distributed as dist
from torch import nn


@torch.library.custom_op("internimage::sum_over_ranks", mutates_args=())
def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The sum of `x` over all ranks, differentiable."""
    total = x.clone()
    dist.all_reduce(total)
    return total


sum_over_ranks.register_fake(torch.empty_like)
sum_over_ranks.register_autograd(lambda _, gradient: sum_over_ranks(gradient.contiguous()))


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that trains by the statistics of all ranks together: torch's SyncBatchNorm, which needs a GPU."""

    def forward(self, x):
        """[N, C, H, W] -> the same; every rank must call it."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            exact = x.to(self.running_mean.dtype)
            count = exact.new_full((1,), exact[:, 0].numel())
            total = sum_over_ranks(torch.cat([exact.sum((0, 2, 3)), count]))
            count, mean = total[-1], total[:-1] / total[-1]
            centered = exact - mean[:, None, None]
            variance = sum_over_ranks(centered.square().sum((0, 2, 3))) / count
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            scale = (variance + self.eps).rsqrt() * self.weight
            return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
