"""Trains the language model of examples/train_lm.py through flashdelta in bf16, and in float32 through plain PyTorch.

Usage: python bench/training.py [--output training.json] [--steps 200] [--seeds 3] [--seconds 150]

Same weights, data and learning rates for each seed. How far runs drift apart without our kernels is measured too: float32 from
weights that are rounded to bf16 first ("noise"), and bf16 with the rule alone in float32 PyTorch ("bfloat16"). Every run is a row
training/<path>/<seed> of the output: the loss of each step and of held-out text in bits per byte, and the time of a step. Ends
with exit status 1 if ours (means of 20 steps) is further from float32 than twice the further of these, or 0.02 bits where
that is more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_lm

from result_file import Deadline, Results, context, progress

CHUNK = 64
SMOOTH = 20  # steps of a mean
LEAST = 0.02  # bits per byte that two curves may always differ by
PATHS = ("float32", "noise", "bfloat16", "flashdelta")


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def plain_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None = None,
    **options: bool,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule of raw gates, q and k normalised, in chunks of CHUNK tokens: float32 PyTorch, autograd's gradients.

    Args:
        q, k: [B, T, H, K]. v: [B, T, H, V]. g, beta: [B, T, H], raw gates and logits. A_log, dt_bias: [H].
        initial_state: [B, H, K, V], or none.
        options: what else the functions of flashdelta are called with; the model always asks for the same.

    Returns:
        (o [B, T, H, V], final state [B, H, K, V]).
    """
    T, K = q.shape[1], q.shape[-1]
    g = -A_log.float().exp() * F.softplus(g.float() + dt_bias.float())
    beta = beta.float().sigmoid()
    q, k = (x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))

    def chunks(x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [B, H, chunks, CHUNK, ...], with zeros at the end: neither a write nor a decay."""
        padding = [0, 0] * (x.ndim - 2) + [0, -T % CHUNK]
        return F.pad(x.float(), padding).transpose(1, 2).unflatten(2, (-1, CHUNK))

    q, k, v, g, beta = (chunks(x) for x in (q * K**-0.5, k, v, g, beta))
    gamma = g.cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = (gamma[..., :, None] - gamma[..., None, :]).masked_fill(~later, -torch.inf).exp()
    lower = (beta[..., None] * decay * (k @ k.mT)).tril(-1)
    right = torch.cat([beta[..., None] * v, (beta * gamma.exp())[..., None] * k], -1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    written, read = solved.split([v.shape[-1], K], -1)
    inside, query = decay * (q @ k.mT), q * gamma.exp()[..., None]
    end = gamma[..., -1:]
    key = k * (end - gamma).exp()[..., None]
    state = q.new_zeros(*q.shape[:2], K, v.shape[-1]) if initial_state is None else initial_state.float()
    outputs = []
    for n in range(q.shape[2]):
        update = written[:, :, n] - read[:, :, n] @ state
        outputs.append(query[:, :, n] @ state + inside[:, :, n] @ update)
        state = end[:, :, n, :, None].exp() * state + key[:, :, n].mT @ update
    return torch.cat(outputs, 2)[:, :, :T].transpose(1, 2), state


def run(path: str, seed: int, arguments: argparse.Namespace, text: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Trains one model: the losses of all steps and of the held-out text, seconds per step."""
    device = arguments.device
    torch.manual_seed(seed)
    model = train_lm.LanguageModel(layers=arguments.layers).to(device)
    if path == "noise":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    if path != "flashdelta":
        for block in model.blocks:
            block.mixer.prefill_rule = plain_rule
    autocast = torch.autocast(device, torch.bfloat16, enabled=path in ("bfloat16", "flashdelta"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    losses: list[Tensor] = []
    start = time.perf_counter()
    for step in range(arguments.steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * train_lm.learning_rate(step, step / arguments.steps)
        at = torch.randint(len(text) - arguments.context, (arguments.batch,), generator=generator)
        window = torch.stack([text[i : i + arguments.context + 1] for i in at]).to(device, torch.long)
        losses.append(train_lm.train_step(model, optimizer, window, autocast))
    curve = torch.stack(losses).tolist()
    seconds = time.perf_counter() - start
    return {"loss": curve, "held_out": train_lm.bits_per_byte(model, held_out, autocast), "seconds": seconds}


def smooth(curve: list[float]) -> list[float]:
    width = min(SMOOTH, len(curve))
    return [statistics.mean(curve[i : i + width]) for i in range(len(curve) - width + 1)]


def apart(a: list[float], b: list[float]) -> float:
    """Largest difference of two smoothed curves."""
    return max(abs(x - y) for x, y in zip(smooth(a), smooth(b), strict=True))


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("training.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=150, help="no further seed is begun after it")
    for name, default in (
        ("steps", 200),
        ("seeds", 3),
        ("layers", 3),
        ("context", 512),
        ("batch", 8),
        ("held-out", 1 << 16),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args(given)
    deadline = Deadline(arguments.seconds)
    text, held_out = train_lm.standard_library()
    results = Results(arguments.output, context("bench/training.py", {}, {}), again=True)
    model = f"{arguments.layers} layers, {arguments.batch} x {arguments.context} bytes a step, {arguments.steps} steps"
    bad = done = 0
    bar = progress(total=arguments.seeds * len(PATHS), desc="training", unit="run")
    for seed in range(arguments.seeds):
        if deadline.left() < 0:
            break
        runs: dict[str, dict[str, Any]] = {}
        for path in PATHS:
            runs[path] = run(path, seed, arguments, text, held_out[: arguments.held_out])
            bar.update()
        distance = {path: apart(runs[path]["loss"], runs["float32"]["loss"]) for path in PATHS}
        right = distance["flashdelta"] <= max(2 * distance["noise"], 2 * distance["bfloat16"], LEAST)
        bad += not right
        done += 1
        for path in PATHS:
            about = {"loss": [round(x, 4) for x in runs[path]["loss"]], "held_out": runs[path]["held_out"], "model": model}
            about["apart"] = distance[path]
            results.add(
                f"training/{path}/{seed}", arguments.steps, runs[path]["seconds"] / arguments.steps * 1e6, 0.0, **about
            )
        results.save()
        held = ", ".join(f"{path} {runs[path]['held_out']:.4f} (apart by {distance[path]:.4f})" for path in PATHS)
        bar.write(f"seed {seed}, bits per byte of held-out text: {held}{'' if right else ': FAILED'}")
    bar.close()
    print(f"training: {done} of {arguments.seeds} seeds, {bad} further apart than noise allows; {arguments.output}")
    return 1 if bad or done == 0 else 0


if __name__ == "__main__":
    raise SystemExit(main())
