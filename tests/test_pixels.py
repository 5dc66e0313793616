"""Convolutions, shifts, pictures and replayed sequences against plain arithmetic and counters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from pgjax import envs
from pgjax.models import pixels
from pgjax.sampling import replay

RNG = np.random.default_rng(0)


def test_convolutions_and_shifts():
    image = jnp.asarray(RNG.integers(0, 256, size=(2, 9, 9, 2)), jnp.uint8)
    params = pixels.init(jax.random.key(0), (9, 9, 2), channels=3, strides=(2, 1))
    found = pixels.apply(params, image, strides=(2, 1))
    assert found.shape == (2, pixels.output_size((9, 9, 2), channels=3, strides=(2, 1)))
    for n in range(2):
        x = np.asarray(image[n], np.float64) / 255 - 0.5
        for layer, stride in zip(params, (2, 1), strict=True):
            kernel = np.asarray(layer["kernel"])
            x = np.stack(
                [
                    sum(
                        signal.correlate2d(x[..., i], kernel[:, :, i, o], mode="valid")
                        for i in range(x.shape[-1])
                    )[::stride, ::stride]
                    for o in range(3)
                ],
                -1,
            )
            x = np.maximum(x, 0)
        np.testing.assert_allclose(found[n], x.reshape(-1), atol=1e-5)
    np.testing.assert_array_equal(pixels.random_shift(jax.random.key(1), image, pad=0), image)
    many = jnp.broadcast_to(image[:1], (300, 9, 9, 2))
    shifted = np.asarray(pixels.random_shift(jax.random.key(2), many, pad=1))
    wide = np.pad(np.asarray(image[0]), ((1, 1), (1, 1), (0, 0)), mode="edge")
    crops = [wide[i : i + 9, j : j + 9] for i in range(3) for j in range(3)]
    counts = [sum((x == crop).all() for x in shifted) for crop in crops]
    assert sum(counts) == 300 and min(counts) > 10
    for bad in ((9, 8, 1), (4, 4, 1), (9, 9)):
        with pytest.raises(ValueError, match="image"):
            pixels.init(jax.random.key(0), bad, strides=(2, 1))
    with pytest.raises(ValueError, match="images: expected uint8"):
        pixels.apply(params, image / 255, strides=(2, 1))
    with pytest.raises(ValueError, match="images: expected rank 4"):
        pixels.random_shift(jax.random.key(0), image[0])


def test_a_spot_among_others():
    env = envs.pixels.rendered_point(4, side=8, speed=0.5)
    state, seen = env.reset(jax.random.key(0))
    assert seen.shape == (8, 8, 1) and seen.dtype == jnp.uint8
    step = env.step(jax.random.key(1), state, jnp.array([2.0, -0.5]))
    moved = np.clip(state.state.point + np.array([0.5, -0.25]), -1, 1)
    np.testing.assert_allclose(step.state.state.point, moved, atol=1e-6)
    np.testing.assert_allclose(step.reward, -np.linalg.norm(state.state.point), rtol=1e-5)
    assert not (step.terminated or step.truncated)
    assert not np.allclose(step.state.state.others, state.state.others)
    scene = envs.pixels.Scene(jnp.array([-1.0, 1.0]), jnp.zeros((1, 2)))
    shown = envs.pixels.picture(scene, side=9)[..., 0]
    assert shown[0, 8] == 255 and shown[4, 4] == 255 and shown[8, 0] == 0
    np.testing.assert_array_equal(
        shown,
        envs.pixels.picture(envs.pixels.Scene(scene.others[0], scene.point[None]), side=9)[..., 0],
    )
    dim = envs.pixels.picture(scene, side=9, brightness=0.4)[..., 0]
    assert dim[0, 8] == 255 and dim[4, 4] == 102
    with pytest.raises(ValueError, match="speed"):
        envs.pixels.rendered_point(speed=0.0)


def test_sequences_follow_each_other_within_an_episode():
    """Counters: N environments by turns, the time of each, and the episode it is in."""
    worlds, length, capacity = 2, 3, 24
    buffer = replay.init({"t": 0, "n": 0, "end": False}, capacity=capacity)
    ends = {0: (4, 9, 10), 1: (6, 13)}

    def rows(times):
        each = [(t, n, t in ends[n]) for t in times for n in range(worlds)]
        t, n, end = map(np.array, zip(*each, strict=True))
        return {"t": jnp.asarray(t), "n": jnp.asarray(n), "end": jnp.asarray(end)}

    def valid(times):
        return {
            (n, t)
            for n in range(worlds)
            for t in times
            if t + length - 1 in times and not any(t + k in ends[n] for k in range(length - 1))
        }

    take = jax.jit(
        lambda buffer, key: replay.sample_sequences(
            buffer, key, batch_size=600, length=length, ended=lambda x: x["end"], stride=worlds
        )
    )
    found, ok = take(replay.add(buffer, rows(range(2))), jax.random.key(0))
    assert not ok.any()  # two steps hold no three
    for begin, until in ((0, 5), (5, 10), (10, 15), (15, 17)):
        buffer = replay.add(buffer, rows(range(begin, until)))
        held = range(max(0, until - capacity // worlds), until)
        found, ok = take(buffer, jax.random.key(until))
        assert ok.all()
        t, n = np.asarray(found["t"]), np.asarray(found["n"])
        assert (np.diff(t, axis=1) == 1).all() and (n == n[:, :1]).all()
        assert not np.asarray(found["end"])[:, :-1].any()
        starts = list(zip(n[:, 0].tolist(), t[:, 0].tolist(), strict=True))
        assert set(starts) == valid(held)
        assert max(starts.count(x) for x in set(starts)) < 3 * 600 / len(valid(held))
    with pytest.raises(ValueError, match="stride: expected a divisor"):
        replay.sample_sequences(
            buffer, jax.random.key(0), batch_size=1, length=1, ended=lambda x: x["end"], stride=5
        )
    with pytest.raises(ValueError, match="length"):
        replay.sample_sequences(
            buffer, jax.random.key(0), batch_size=1, length=0, ended=lambda x: x["end"]
        )
