"""The network for small images, against XLA's own convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import agents, envs
from pgjax.models import layer_norm_convolution, layer_norm_mlp


def test_it_is_a_convolution_and_a_normalised_perceptron():
    params = layer_norm_convolution.init(jax.random.key(0), (6, 5, 2), (8, 3), channels=4, window=3)
    params["convolution"]["bias"] = jnp.arange(4.0)
    params["convolution"]["scale"] = jnp.array([1.0, 0.5, -2.0, 1.0])
    x = jax.random.normal(jax.random.key(1), (7, 6, 5, 2))
    layer = params["convolution"]
    y = jax.lax.conv_general_dilated(
        x,
        layer["kernel"].reshape(3, 3, 2, 4),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y + layer["bias"]
    y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-6)
    want = layer_norm_mlp.apply(params["mlp"], jax.nn.relu(y * layer["scale"]).reshape(7, -1))
    found = layer_norm_convolution.apply(params, x)
    assert found.shape == (7, 3)
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-6)
    one = layer_norm_convolution.apply(params, x[0])
    np.testing.assert_allclose(one, found[0], rtol=1e-5, atol=1e-6)


def test_stacked_parameters_need_no_convolution_in_groups():
    keys = jax.random.split(jax.random.key(0), 2)
    stacked = jax.vmap(lambda k: layer_norm_convolution.init(k, (4, 4, 1), (2,), channels=3))(keys)
    text = str(
        jax.make_jaxpr(jax.vmap(layer_norm_convolution.apply))(stacked, jnp.ones((2, 4, 4, 1)))
    )
    assert "dot_general" in text and "conv_general" not in text


@pytest.mark.parametrize(
    ("shape", "named", "message"),
    [
        ((4, 4), {}, "shape: expected .height, width, channels., got .4, 4."),
        ((4, 2, 1), {"window": 3}, "window"),
        ((4, 4, 1), {"channels": 0}, "channels"),
    ],
)
def test_bad_input(shape, named, message):
    with pytest.raises(ValueError, match=message):
        layer_norm_convolution.init(jax.random.key(0), shape, (2,), **named)


def test_a_q_network_needs_images():
    with pytest.raises(ValueError, match="expected height, width and channels"):
        agents.convolutional_q_network(envs.control.cart_pole())
