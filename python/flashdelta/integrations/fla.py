"""flashdelta behind flash-linear-attention's own functions.

    import flashdelta.integrations.fla
    flashdelta.integrations.fla.enable()

FLA 0.6 asks a registry of backends before it runs its Triton kernels. `enable()` registers flashdelta there for
`gated_delta_rule`: calls of `fla.ops.gated_delta_rule.chunk_gated_delta_rule` (also inside `fla.layers.GatedDeltaNet`)
that flashdelta has a fast backend for are served by it, all others go on as before, and FLA logs which. On a CPU, where FLA
has no kernels, they then work at all. FLA does not ask its registry for `fused_recurrent_gated_delta_rule`, which stays
FLA's own; use `flashdelta.fused_recurrent_gated_delta_rule`, which has the same signature.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from .. import chunk_gated_delta_rule
from ._planner import refusal

_enabled = False
_CP_CONTEXT = 12  # its place after q, k and v


def enable() -> None:
    """Registers flashdelta, ahead of FLA's other backends; a second call changes nothing.

    Raises:
        ImportError: FLA is not installed or older than 0.6, which has no registry.
    """
    global _enabled
    _register()
    _enabled = True


def disable() -> None:
    """FLA chooses as if flashdelta were not registered."""
    global _enabled
    _enabled = False


@functools.cache
def _register() -> None:
    from fla.backends import BaseBackend, register  # type: ignore[import-untyped, import-not-found, unused-ignore]

    class FlashdeltaBackend(BaseBackend):  # type: ignore[misc, unused-ignore]
        """Gated delta rule by flashdelta; see flashdelta.integrations.fla."""

        backend_type = "flashdelta"
        priority = 1

        def is_enabled(self) -> bool:
            return _enabled

        def chunk_gated_delta_rule_verifier(
            self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[bool, str | None]:
            """Tells FLA whether flashdelta serves this call, and if not, why."""
            if kwargs.get("cp_context") is not None or (len(args) > _CP_CONTEXT and args[_CP_CONTEXT] is not None):
                return False, "flashdelta has no context parallelism across devices"
            reason = refusal("forward", q, v, gradients=any(x.requires_grad for x in (q, k, v)))
            return reason is None, reason

        def chunk_gated_delta_rule(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            return chunk_gated_delta_rule(*args, **kwargs)

    register("gated_delta_rule")(FlashdeltaBackend)
