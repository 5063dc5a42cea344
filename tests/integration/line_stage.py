"""A stage that trains in a second, run as a program by the resume tests: `python line_stage.py --preset FILE --out DIR …`."""
import os
import time

import torch
from safetensors.torch import save_file
from torch import nn

from vugen.train.loop import stage_main

PAUSE = float(os.environ.get("LINE_PAUSE", "0"))  # seconds a step, so that a signal can fall between steps
PLAIN = os.environ.get("LINE_PLAIN") == "1"  # no batch statistics, dropout or noise: nothing that depends on the number of processes
MEASURE = float(os.environ.get("LINE_MEASURE", "0"))  # seconds that measuring takes, so that a signal can fall into it
BROKEN_FROM = int(os.environ.get("LINE_BROKEN_FROM", "-1"))  # sample number from which the samples are not finite


class Network(nn.Module):
    "A frozen part, dropout and batch statistics: everything that a careless resume gets wrong."

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 8).requires_grad_(False)
        middle = [] if PLAIN else [nn.BatchNorm1d(16), nn.Dropout(0.2)]
        self.head = nn.Sequential(nn.Linear(8, 16), *middle, nn.SiLU(), nn.Linear(16, 2))

    def forward(self, inputs): return self.head(self.frozen(inputs))


class LineStage:
    name = "line"

    def __init__(self, preset, root): self.preset, self.root = preset, root

    def build(self): return Network()

    def batch(self, indices):
        numbers = torch.tensor(indices, dtype=torch.float32)
        inputs = torch.stack([(numbers * scale).sin() for scale in (0.3, 0.7, 1.1, 1.9)], dim=1)
        if BROKEN_FROM >= 0: inputs[numbers >= BROKEN_FROM] = torch.nan
        return {"inputs": inputs, "targets": inputs[:, :2] * inputs[:, 2:]}

    def loss(self, module, batch, generator):
        time.sleep(PAUSE)
        noise = torch.randn(batch["targets"].shape, generator=generator, device=batch["targets"].device)
        loss = (module(batch["inputs"]) - batch["targets"] - (0.0 if PLAIN else 0.05) * noise).square().mean()
        return loss, {"error": loss.detach().sqrt()}

    def save(self, module, out): save_file(module.state_dict(), out / "model.safetensors")

    def measure(self, module, out):
        if MEASURE: time.sleep(MEASURE)
        return [{"metric": "norm", "value": sum(value.float().norm().item() for value in module.state_dict().values())}]


if __name__ == "__main__": stage_main(LineStage)
