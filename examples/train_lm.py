#!/usr/bin/env python3
"""Trains a small byte-level Gated DeltaNet language model on the Python standard library, then runs it.

    python examples/train_lm.py                about a minute of training, then prefill and decode
    python examples/train_lm.py --seconds 600  more of it

What it shows: the loss falls; on files the model never saw it needs fewer bits per byte than a byte-bigram model of the same
training text; a 4,096-byte prompt is read in one call (prefill); 200 bytes are written one at a time from the state that
prefill left (decode); and both give the logits of one pass over everything. It exits with 1 if one of these fails.

Model: per layer a short causal convolution, the gated delta rule with its gates and norms inside flashdelta, a gated output
norm, and a SwiGLU feed-forward part. The whole memory of a layer while decoding is one K x V state per head and the
last three inputs of its convolution.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import pathlib
import sysconfig
import time
from dataclasses import dataclass

# Read by OpenMP when torch loads it. Waiting threads sleep: where other programs use the processor, threads that spin would
# take it from the very thread they wait for (seen: 20 times slower).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import flashdelta

CONTEXT = 512  # bytes of a training sequence
FEWEST_STEPS = 80  # of training: a busy machine takes longer, but learns as much
BATCH = 8  # training sequences per step
PROMPT = 4096  # bytes of the prompt
DECODED = 200  # bytes written after it
HELD_OUT = 2**18  # bytes both models are judged on


# --- text ------------------------------------------------------------------------------------------------------------


def standard_library() -> tuple[Tensor, Tensor]:
    """Returns (training, held out) source text of the standard library as uint8 vectors; every tenth file is held out."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = sorted(f for f in root.rglob("*.py") if left_out.isdisjoint(f.relative_to(root).parts))

    def text(chosen: list[pathlib.Path]) -> Tensor:
        return torch.from_numpy(numpy.frombuffer(b"".join(f.read_bytes() for f in chosen), numpy.uint8).copy())

    held_out = text(files[::10])[:HELD_OUT]
    if len(held_out) < HELD_OUT:
        raise SystemExit(f"the standard library in {root} holds too little source text for this example")
    return text([f for i, f in enumerate(files) if i % 10]), held_out


def bigram_bits_per_byte(train: Tensor, text: Tensor) -> float:
    """Returns the bits per byte that a bigram model counted on `train` (add-one smoothing) needs for `text`."""
    pairs = train[:-1].long() * 256 + train[1:].long()
    counts = torch.bincount(pairs, minlength=256 * 256).view(256, 256).double() + 1
    bits = -(counts / counts.sum(1, keepdim=True)).log2()
    return bits[text[:-1].long(), text[1:].long()].mean().item()


# --- model -----------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """What one layer carries from call to call."""

    inputs: Tensor  # [B, 3, channels] last inputs of the convolution
    state: Tensor  # [B, H, K, V], fp32


class GatedDeltaNet(nn.Module):
    """The token mixer: [B, T, width] -> [B, T, width]."""

    def __init__(self, width: int, heads: int, head_dim: int, filter_width: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.prefill_rule = flashdelta.chunk_gated_delta_rule
        inner = heads * head_dim
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.filter = nn.Parameter(torch.randn(filter_width, 3 * inner) / filter_width**0.5)
        self.gates = nn.Linear(width, 2 * heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(0.1, 8).log())
        self.dt_bias = nn.Parameter(torch.full((heads,), -3.0))
        self.output_gate = nn.Linear(width, inner, bias=False)
        self.norm = nn.RMSNorm(head_dim)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        B, T, _ = x.shape
        qkv = self.qkv(x)
        before = qkv.new_zeros(B, len(self.filter) - 1, qkv.shape[2]) if memory is None else memory.inputs
        window = torch.cat([before, qkv], 1)
        qkv = F.silu(sum(window[:, i : i + T] * tap for i, tap in enumerate(self.filter)))
        q, k, v = qkv.unflatten(2, (3, self.heads, self.head_dim)).unbind(2)
        a, b = self.gates(x).chunk(2, dim=-1)
        rule = self.prefill_rule if T > 1 else flashdelta.fused_recurrent_gated_delta_rule
        o, state = rule(
            q,
            k,
            v,
            g=a,
            beta=b,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            initial_state=None if memory is None else memory.state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
        )
        o = self.norm(o).flatten(2) * F.silu(self.output_gate(x))
        return self.out(o), Memory(window[:, T:], state)


class FeedForward(nn.Module):
    """SwiGLU: [B, T, width] -> [B, T, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(width), GatedDeltaNet(width, heads, head_dim)
        self.feed_forward_norm, self.feed_forward = nn.RMSNorm(width), FeedForward(width)

    def forward(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        mixed, memory = self.mixer(self.mixer_norm(x), memory)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), memory


class LanguageModel(nn.Module):
    """Bytes [B, T] -> logits [B, T, 256] and the memory of every layer."""

    def __init__(self, width: int = 128, layers: int = 3, heads: int = 1, head_dim: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads, head_dim) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.logits = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor, memory: list[Memory] | None = None) -> tuple[Tensor, list[Memory]]:
        x, after = self.embedding(tokens), []
        for i, block in enumerate(self.blocks):
            x, layer_memory = block(x, None if memory is None else memory[i])
            after.append(layer_memory)
        return self.logits(self.norm(x)).float(), after


# --- training --------------------------------------------------------------------------------------------------------


def learning_rate(step: int, done: float) -> float:
    """The share of the largest learning rate: up during 20 steps, then down with the share of the training that is done."""
    return min(1.0, (step + 1) / 20) * (0.05 + 0.95 * math.cos(done * math.pi / 2))


def train_step(model: LanguageModel, optimizer: torch.optim.Optimizer, window: Tensor, autocast: torch.autocast) -> Tensor:
    """One step on bytes [B, T + 1]; returns its loss in bits per byte, still on the device."""
    with autocast:
        logits, _ = model(window[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach() / math.log(2)


def train_model(model: LanguageModel, text: Tensor, seconds: float, autocast: torch.autocast) -> list[float]:
    """Trains for about `seconds`, but at least FEWEST_STEPS steps; returns the loss of each in bits per byte."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(total=100, unit="%", bar_format="training {l_bar}{bar}| {elapsed} {postfix}") as bar:
        while (done := min((time.perf_counter() - start) / seconds, len(losses) / FEWEST_STEPS)) < 1:
            optimizer.param_groups[0]["lr"] = 3e-3 * learning_rate(len(losses), done)
            at = torch.randint(len(text) - CONTEXT, (BATCH,))
            window = torch.stack([text[i : i + CONTEXT + 1] for i in at]).to(device, torch.long)
            losses.append(train_step(model, optimizer, window, autocast).item())
            bar.set_postfix_str(f"step {len(losses)}, {losses[-1]:.2f} bits per byte")
            bar.update(100 * done - bar.n)
        bar.update(100 - bar.n)
    return losses


@torch.no_grad()
def bits_per_byte(model: LanguageModel, text: Tensor, autocast: torch.autocast) -> float:
    """Returns the bits per byte the model needs for `text`, read in pieces of 4 contexts that each start from nothing."""
    device = next(model.parameters()).device
    nats, count, piece = 0.0, 0, 4 * CONTEXT
    for at in range(0, len(text) - 1, BATCH * piece):
        part = text[at : at + BATCH * piece + 1].to(device, torch.long)
        rows = (len(part) - 1) // piece
        if rows == 0:
            break
        with autocast:
            logits, _ = model(part[: rows * piece].view(rows, piece))
        target = part[1 : rows * piece + 1]
        nats += F.cross_entropy(logits.flatten(0, 1), target, reduction="sum").item()
        count += len(target)
    return nats / count / math.log(2)


# --- inference -------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: Tensor, count: int, autocast: torch.autocast
) -> tuple[Tensor, Tensor, float, float]:
    """Reads `prompt` [T] in one call and then writes `count` bytes, each sampled from the eight likeliest.

    Returns:
        (the bytes written [count], the logits of all T + count - 1 positions, seconds of prefill, seconds of decode).
    """
    device = prompt.device
    with autocast:
        model(prompt[None])  # first touch of the memory a prompt of this length needs
        synchronize(device)
        start = time.perf_counter()
        logits, memory = model(prompt[None])
        synchronize(device)
        prefilled = time.perf_counter()
        parts, written = [logits], []
        for i in range(count):
            best, byte = parts[-1][0, -1].topk(8)
            written.append(byte[torch.multinomial(best.softmax(0), 1)])
            if i + 1 < count:
                logits, memory = model(written[-1][None], memory)
                parts.append(logits)
        synchronize(device)
    end = time.perf_counter()
    return torch.cat(written), torch.cat(parts, 1)[0], prefilled - start, end - prefilled


def choose_device() -> torch.device:
    """Returns a GPU where flashdelta has kernels for training this model, else the CPU."""
    if torch.cuda.is_available():
        probe = [torch.zeros(1, 64, 1, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        gate = torch.zeros(1, 64, 1, device="cuda")
        try:
            flashdelta.chunk_gated_delta_rule(*probe, gate, gate)[0].float().sum().backward()
        except (NotImplementedError, RuntimeError, ValueError) as reason:
            print(f"the GPU is not used: {reason}")
        else:
            return torch.device("cuda")
    return torch.device("cpu")


def save_plot(path: pathlib.Path, losses: list[float], model_bits: float, bigram_bits: float) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError as reason:
        print(f"no plot: {reason}")
        return

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = max(1, len(losses) // 50)
    smooth = numpy.convolve(losses, numpy.ones(width) / width, "valid")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses, color="0.8", linewidth=0.8, label="training, each step")
    axes.plot(range(width - 1, len(losses)), smooth, label=f"training, mean of {width} steps")
    axes.axhline(bigram_bits, color="C3", linestyle="--", label=f"byte bigram, held out: {bigram_bits:.2f}")
    axes.axhline(model_bits, color="C2", linestyle="--", label=f"this model, held out: {model_bits:.2f}")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, 8.2), title="Gated DeltaNet on the Python standard library")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def distance(got: Tensor, expected: Tensor, dim: int | None = None) -> float:
    """Returns the relative distance between logits: of all positions together, or with dim = 1 the largest of a position."""
    return float(((got - expected).norm(dim=dim) / expected.norm(dim=dim)).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="training time (default 60)")
    parser.add_argument(
        "--plot", type=pathlib.Path, default=pathlib.Path("build/train_lm.png"), help="the loss plot to write"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    device = choose_device()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    train, held_out = standard_library()
    model = LanguageModel().to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(train) / 1e6:.1f} MB text, {parameters / 1e6:.2f} M parameters, {device}, {torch.get_num_threads()} threads"
    )

    losses = train_model(model, train, arguments.seconds, autocast)
    model.eval()
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    model_bits, bigram_bits = bits_per_byte(model, held_out, autocast), bigram_bits_per_byte(train, held_out)
    save_plot(arguments.plot, losses, model_bits, bigram_bits)
    print(f"loss         {first:.3f} -> {last:.3f} bits per byte over {len(losses)} steps; plot: {arguments.plot}")
    print(f"held out     {model_bits:.3f} bits per byte; a byte bigram needs {bigram_bits:.3f}")

    prompt = held_out[:PROMPT].to(device, torch.long)
    written, logits, prefill, decode = generate(model, prompt, DECODED, autocast)
    print(f"prefill      {PROMPT / prefill:,.0f} tokens per second ({PROMPT} bytes in {prefill * 1e3:.1f} ms)")
    print(f"decode       {(DECODED - 1) / decode:,.0f} tokens per second ({DECODED} bytes in {decode * 1e3:.1f} ms)")
    print(f"written      {bytes(written.tolist())!r}")

    everything = torch.cat([prompt, written[:-1]])[None]
    with torch.no_grad(), autocast:
        at_once, _ = model(everything)
    # the positions that decode has written
    decoded, expected = logits[PROMPT:].cpu(), at_once[0, PROMPT:].cpu()
    difference, limit = distance(decoded, expected, dim=1), 1e-4
    # bf16 rounds differently along the two ways: float32 judges both, and one pass has to be near. All positions together:
    # single ones are several times as far off as others, on either way.
    if device.type != "cpu":
        with torch.no_grad():
            exact, _ = copy.deepcopy(model).cpu()(everything.cpu())
        limit = min(2 * distance(expected, exact[0, PROMPT:]), 2e-2)
        difference = distance(decoded, exact[0, PROMPT:])
    beside = "one pass" if device.type == "cpu" else "one pass in float32"
    print(f"consistency  prefill + decode differ from {beside} by {difference:.1e} of the logits (limit {limit:.1e})")

    failures = []
    if not last < first:
        failures.append("the loss did not fall")
    if not model_bits < bigram_bits:
        failures.append("the model is not better than a byte bigram")
    if not difference <= limit:
        failures.append("prefill followed by decode does not give the logits of one pass")
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
