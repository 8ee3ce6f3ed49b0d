"""`python -m flashdelta info | check | bench`: what runs here, how exact it is, how fast it is."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor

from . import __version__, _lib, backends, forward, step

#: Largest relative L2 error per (sequence, head) against float64: of o, of the final state, of any gradient.
LIMITS = {
    torch.float32: (5e-6, 5e-6, 5e-5),
    torch.bfloat16: (2.5e-3, 5e-6, 4e-3),
    torch.float16: (4e-4, 5e-6, 1e-3),
}
#: On a GPU the operands of the tensor cores are halves too.
CUDA_LIMITS = {torch.bfloat16: (6e-3, 6e-3, 2e-2), torch.float16: (2e-3, 2e-3, 1e-2)}
COLUMNS = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dstate")


def info() -> int:
    """Print backends, devices and versions."""
    print(f"flashdelta {__version__} ({_lib.library_path()})")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"CPU threads: {torch.get_num_threads()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"CUDA devices: {', '.join(devices) or 'none'}")
    print("backends, best first:")
    for backend in backends():
        state = "available" if backend.available else "not available"
        print(f"  {backend.name:<10} {backend.device:<5} {state:<14} {backend.detail}")
    return 0


def _inputs(data: str, dtype: torch.dtype, T: int, device: str) -> list[Tensor]:
    """Two sequences, 2 query and key heads, 8 value heads, head dims 128; the same numbers everywhere."""
    random = torch.Generator().manual_seed(0)
    B, H, HV, K, V = 2, 2, 8, 128, 128
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, K, generator=random), dim=-1) for _ in range(2))
    v, state = torch.randn(B, T, HV, V, generator=random), torch.randn(B, HV, K, V, generator=random)
    g = torch.nn.functional.logsigmoid(torch.randn(B, T, HV, generator=random)) / 16
    g[..., :2] = 0
    beta = torch.rand(B, T, HV, generator=random)
    if data == "identical keys":
        k, beta = k[:, :1].expand_as(k), torch.ones_like(beta)
    elif data == "strong decay":
        g = torch.full_like(g, -20)
    return [t.to(device) for t in (q.to(dtype), k.to(dtype), v.to(dtype), g, beta, state)]


def _error(got: Tensor, expected: Tensor, head: int) -> float:
    """Worst relative L2 error per (sequence, head); NaN counts as infinite."""
    others = [i for i in range(1, expected.dim()) if i != head]
    truth = expected.detach().double().cpu()
    difference = (got.detach().double().cpu() - truth).square().sum(others).sqrt()
    ratio = torch.where(difference == 0, 0.0, difference / truth.square().sum(others).sqrt())
    return float(torch.nan_to_num(ratio, nan=torch.inf).max())


def _results(inputs: list[Tensor], backend: str, gradients: list[Tensor] | None) -> list[Tensor]:
    """o, final state and, given the gradients of both, those of all inputs."""
    q, k, v, g, beta, state = inputs = [t.detach().requires_grad_(gradients is not None) for t in inputs]
    results = forward(q, k, v, g, beta, initial_state=state, output_final_state=True, backend=backend)
    outputs = [t for t in results if t is not None]
    if gradients is not None:
        outputs += torch.autograd.grad(outputs, inputs, [d.to(o) for d, o in zip(gradients, outputs, strict=True)])
    return outputs


def _operations(backend: str, inputs: list[Tensor]) -> list[str]:
    """Which of "forward", "backward" and "step" a backend serves."""
    try:
        forward(*inputs[:5], initial_state=inputs[5], backend=backend)
        return ["forward", "backward", "step"] if backend != "sm90" else ["forward", "backward"]
    except NotImplementedError:
        return ["step"]


def check(tokens: int) -> int:
    """Print errors against the float64 recurrence for every backend here; 1 if one is above its limit."""
    chosen = [b for b in backends() if b.available and b.name != "reference"]
    print(f"{'backend':<8} {'data':<15} {'type':<9} {'operation':<9} " + " ".join(f"{name:>8}" for name in COLUMNS))
    broken = 0
    for backend in chosen:
        for data in ("random", "identical keys", "strong decay"):
            for dtype, limits in (LIMITS if backend.device == "cpu" else CUDA_LIMITS).items():
                inputs = _inputs(data, dtype, tokens, backend.device)
                # The gradients of identical keys and of strong decay cancel: ten times the limit of random data.
                factor = 1 if data == "random" else 10
                for operation in _operations(backend.name, inputs):
                    try:
                        errors = _errors(operation, backend.name, inputs)
                    except NotImplementedError:
                        continue
                    shown = [f"{error:8.1e}" for error in errors]
                    for i, error in enumerate(errors):
                        if not error <= factor * limits[min(i, 2)]:
                            shown[i] += " !"
                            broken += 1
                    kind = str(dtype).removeprefix("torch.")
                    print(f"{backend.name:<8} {data:<15} {kind:<9} {operation:<9} " + " ".join(shown))
    print(f"{broken} errors above their limit (marked !)" if broken else "all errors are within their limits")
    return 1 if broken else 0


def _errors(operation: str, backend: str, inputs: list[Tensor]) -> list[float]:
    truth = [t.cpu().double() for t in inputs]
    if operation == "step":
        short = [t[:, :3] for t in inputs[:5]]
        q, k, v, g, beta = short
        o, final = step(q, k, v, g, beta, initial_state=inputs[5], output_final_state=True, backend=backend)
        expected = _results([t[:, :3] for t in truth[:5]] + truth[5:], "reference", None)
        assert final is not None
        return [_error(o, expected[0], 2), _error(final, expected[1], 1)]
    wanted = None
    if operation == "backward":
        random = torch.Generator().manual_seed(1)
        wanted = [torch.randn(inputs[i].shape, generator=random).to(inputs[2].dtype).to(inputs[i].device) for i in (2, 5)]
    got = _results(inputs, backend, wanted)
    expected = _results(truth, "reference", wanted and [t.cpu() for t in wanted])
    heads = (2, 1, 2, 2, 2, 2, 2, 1)
    return [_error(a, b, head) for a, b, head in zip(got, expected, heads, strict=False)]


def bench(repeats: int, plot: Path, memory: bool) -> int:
    """Print a table of speed, beside transformers' PyTorch path where that is installed, and draw it."""
    try:
        import matplotlib  # noqa: F401
        import tqdm  # type: ignore[import-untyped, unused-ignore]  # noqa: F401
    except ImportError as error:
        print(f"bench needs {error.name}: pip install 'flashdelta[bench]'", file=sys.stderr)
        return 1
    from . import benchmark

    if benchmark.torch_functions() is None:
        print("transformers is not installed: no PyTorch path to compare with")
    try:
        result = benchmark.run(repeats=repeats, memory=memory)
    except benchmark.Busy as error:
        print(error, file=sys.stderr)
        return 1
    columns, rows = benchmark.table(result)
    print(f"{benchmark.machine()}; {benchmark.versions()}")
    cells = [columns] + [[benchmark.number(x) if isinstance(x, float) else str(x or "") for x in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(benchmark.summary(result))
    benchmark.plot(result, plot)
    print(f"plot: {plot}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flashdelta", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="backends, devices and versions")
    checking = commands.add_parser("check", help="errors against float64 on this machine; exit status 1 above a limit")
    checking.add_argument("--tokens", type=int, default=200, help="tokens per sequence (default: %(default)s)")
    timing = commands.add_parser("bench", help="a table and a plot of speed")
    timing.add_argument("--repeats", type=int, default=9, help="calls per median (default: %(default)s)")
    timing.add_argument("--plot", type=Path, default=Path("flashdelta-bench.png"), help="default: %(default)s")
    timing.add_argument("--memory", action="store_true", help="also measure peak memory")
    given = parser.parse_args(arguments)
    if given.command == "info":
        return info()
    if given.command == "check":
        return check(given.tokens)
    return bench(given.repeats, given.plot, given.memory)


if __name__ == "__main__":
    sys.exit(main())
