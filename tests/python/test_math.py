"""The formulas of docs/math.md, in float64, against the token recurrence and finite differences."""

from __future__ import annotations

import numpy as np
import pytest

CHUNK, CHUNKS, K, V = 16, 4, 8, 6  # small: finite differences walk over every element
TOKENS = CHUNK * CHUNKS
SCALE = K**-0.5

Array = np.ndarray


def recurrence(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array) -> tuple[Array, Array]:
    o = np.zeros((len(q), v.shape[1]))
    for t in range(len(q)):
        state = np.exp(g[t]) * state
        state = state + np.outer(k[t], beta[t] * (v[t] - state.T @ k[t]))
        o[t] = SCALE * state.T @ q[t]
    return o, state


class Chunk:
    """What forward and backward of one chunk share."""

    def __init__(self, q: Array, k: Array, v: Array, g: Array, beta: Array) -> None:
        self.q, self.k, self.v, self.beta = q, k, v, beta
        gam = np.cumsum(g)
        self.decay = np.exp(gam[-1])
        self.since_start = np.exp(gam)[:, None]
        self.to_end = np.exp(gam[-1] - gam)[:, None]
        self.Gam = np.tril(np.exp(gam[:, None] - gam[None, :]))
        self.T0 = np.linalg.inv(np.eye(len(k)) + np.tril((k @ k.T) * beta[None, :], -1))
        self.P = SCALE * self.Gam * (q @ k.T)

    def forward(self, S: Array) -> tuple[Array, Array]:
        self.S = S
        self.R = (self.Gam * self.T0) @ (self.v - self.since_start * (self.k @ S))
        self.written = self.beta[:, None] * self.R
        o = SCALE * self.since_start * (self.q @ S) + self.P @ self.written
        return o, self.decay * S + (self.to_end * self.k).T @ self.written

    def transition(self) -> tuple[Array, Array]:
        TT = self.beta[:, None] * self.Gam * self.T0
        Khat = self.to_end * self.k
        return self.decay * np.eye(K) - Khat.T @ TT @ (self.since_start * self.k), Khat.T @ TT @ self.v

    def backward(self, do: Array, dS1: Array) -> tuple[dict[str, Array], Array]:
        q, k, S, R, beta, written = self.q, self.k, self.S, self.R, self.beta, self.written
        dwritten = self.P.T @ do + self.to_end * (k @ dS1)
        dv = (self.Gam * self.T0).T @ (beta[:, None] * dwritten)
        dU = -self.since_start * dv
        dS = self.decay * dS1 + SCALE * q.T @ (self.since_start * do) + k.T @ dU

        dP = SCALE * self.Gam * (do @ written.T)
        X = self.Gam * np.tril(dv @ R.T, -1)
        E = -X * beta[None, :]
        dq = SCALE * self.since_start * (do @ S.T) + dP @ k
        dk = dU @ S.T + E @ k + dP.T @ q + self.to_end * (written @ dS1.T) + E.T @ k
        dbeta = (dwritten * R).sum(1) - ((k @ k.T) * X).sum(0)
        N = np.tril(dP * (q @ k.T) + E * (k @ k.T), -1)
        a = SCALE * self.since_start[:, 0] * (q * (do @ S.T)).sum(1) + (k * (dU @ S.T)).sum(1) + N.sum(1) - N.sum(0)
        w = self.to_end[:, 0] * (k * (written @ dS1.T)).sum(1)
        dg = np.cumsum(a[::-1])[::-1] + np.cumsum(w) - w + self.decay * (dS1 * S).sum()
        return {"q": dq, "k": dk, "v": dv, "g": dg, "beta": dbeta}, dS


@pytest.fixture(scope="module")
def inputs() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    k = rng.normal(size=(TOKENS, K))
    beta = rng.random(TOKENS)
    beta[5] = 0.0
    return {
        "q": rng.normal(size=(TOKENS, K)),
        "k": k / np.linalg.norm(k, axis=1, keepdims=True),
        "v": rng.normal(size=(TOKENS, V)),
        "g": -0.3 * rng.random(TOKENS),
        "beta": beta,
        "state": rng.normal(size=(K, V)),
    }


def chunks(inputs: dict[str, Array]) -> list[Chunk]:
    names = ("q", "k", "v", "g", "beta")
    return [Chunk(*(inputs[n][c * CHUNK : (c + 1) * CHUNK] for n in names)) for c in range(CHUNKS)]


def test_chunks_equal_the_recurrence(inputs: dict[str, Array]) -> None:
    expected, expected_state = recurrence(**inputs)
    state, outputs = inputs["state"], []
    for chunk in chunks(inputs):
        o, state = chunk.forward(state)
        outputs.append(o)
    np.testing.assert_allclose(np.concatenate(outputs), expected, atol=1e-12)
    np.testing.assert_allclose(state, expected_state, atol=1e-12)


def test_a_chunk_is_an_affine_map_of_its_state(inputs: dict[str, Array]) -> None:
    state = inputs["state"]
    for chunk in chunks(inputs):
        M, B = chunk.transition()
        _, after = chunk.forward(state)
        np.testing.assert_allclose(M @ state + B, after, atol=1e-12)
        state = after


def test_norm_of_the_transition_is_bounded(inputs: dict[str, Array]) -> None:
    for c, chunk in enumerate(chunks(inputs)):
        tokens = slice(c * CHUNK, (c + 1) * CHUNK)
        grow = np.maximum(1, abs(1 - inputs["beta"][tokens] * (inputs["k"][tokens] ** 2).sum(1)))
        assert np.linalg.norm(chunk.transition()[0], 2) <= np.exp(inputs["g"][tokens].sum()) * grow.prod() * (1 + 1e-12)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "state"])
def test_gradients_equal_finite_differences(inputs: dict[str, Array], name: str) -> None:
    rng = np.random.default_rng(1)
    do, dfinal = rng.normal(size=(TOKENS, V)), rng.normal(size=(K, V))

    state, done = inputs["state"], chunks(inputs)
    for chunk in done:
        _, state = chunk.forward(state)
    dS, parts = dfinal, []
    for c in reversed(range(CHUNKS)):
        gradients, dS = done[c].backward(do[c * CHUNK : (c + 1) * CHUNK], dS)
        parts.insert(0, gradients)
    analytic = dS if name == "state" else np.concatenate([p[name] for p in parts])

    def loss(x: Array) -> float:
        o, final = recurrence(**(inputs | {name: x}))
        return (o * do).sum() + (final * dfinal).sum()

    numeric, step = np.zeros_like(inputs[name]), 1e-6
    for index in np.ndindex(*numeric.shape):
        x = inputs[name].copy()
        x[index] += step
        up = loss(x)
        x[index] -= 2 * step
        numeric[index] = (up - loss(x)) / (2 * step)
    assert abs(numeric - analytic).max() <= 1e-6 * abs(numeric).max()
