"""Two processes train a miniature under FSDP 2 and print the most bytes that one of them had allocated at once (the median of nine runs: how late the CPU's collectives give their buffers back is a matter of chance): `python shards_probe.py RANK FOLDER PRECISION:BATCH …`."""
import contextlib
import json
import statistics
import sys
from types import SimpleNamespace

import torch
from torch import nn

from vugen.train.loop import Ema, _shard_precision, repeated_blocks

WIDTH = 192


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden): return hidden + self.narrow(nn.functional.silu(self.wide(hidden)))


class Network(nn.Module):
    "A frozen part, a stack of blocks, and layers outside of it."
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(16, 16 * WIDTH).requires_grad_(False)
        self.enter, self.layers, self.leave = nn.Linear(16 * WIDTH, WIDTH), nn.ModuleList(Block() for _ in range(6)), nn.Linear(WIDTH, 16)

    def forward(self, hidden):
        with torch.no_grad(): hidden = self.frozen(hidden)
        hidden = self.enter(hidden)
        for layer in self.layers: hidden = layer(hidden)
        return self.leave(hidden).float().square().mean()


def train(precision, batch):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    torch.manual_seed(0)
    module = Network()
    policy = _shard_precision(SimpleNamespace(mixed_precision=precision, device=torch.device("cuda")), module) or MixedPrecisionPolicy()
    for part in [*repeated_blocks(module), module]: fully_shard(part, mp_policy=policy, reshard_after_forward=True, ignored_params=set(module.frozen.parameters()))
    optimizer, average = torch.optim.AdamW([value for value in module.parameters() if value.requires_grad], lr=1e-4, fused=True), Ema(module, 0.9)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext(): loss = module(torch.ones(batch, 16))
        loss.backward()
        optimizer.step(); optimizer.zero_grad(set_to_none=True); average.update(module)


def peak(run):
    "The most that was allocated at once, as torch's profiler saw it."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler: run()
    events = sorted((event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"), key=lambda event: event.start_ns())
    level = highest = 0
    for event in events: level += event.nbytes(); highest = max(highest, level)
    return highest


def main(rank, folder, *cases):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=2)
    train("fp32", 2)  # first use of kernels
    def run(case): train(case.split(":")[0], int(case.split(":")[1]))
    found = {case: statistics.median(peak(lambda: run(case)) for _ in range(9)) for case in cases}
    if rank == "0": print("measured", json.dumps(found))


if __name__ == "__main__": main(*sys.argv[1:])
