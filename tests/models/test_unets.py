"""Both U-Nets: what their output depends on and what it does not depend on."""

import dataclasses
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.schema import ModelConfig
from imagen_jax.models import attention
from imagen_jax.parallel import partitioning
from imagen_jax.stages.network import MODELS

BATCH, SIZE, LENGTH, DIM = 2, 8, 4, 8

TINY = ModelConfig(
    channels=(8,),
    num_res_blocks=(1,),
    self_attention=(True,),
    cross_attention=(True,),
    strided_stem=(True,),
    head_dim=8,
    num_groups=4,
    embed_dim=16,
    text_dim=DIM,
)
# The four variants of the paper's ablation (concatenated tokens, cross-attention, and the two
# poolings alone), each with at least one network, and poolings with both.
MODES = [
    ("unet", "concat", "attention"),
    ("unet", "cross", "mean"),
    ("unet", "none", "attention"),
    ("efficient_unet", "concat", "mean"),
    ("efficient_unet", "cross", "attention"),
    ("efficient_unet", "none", "mean"),
]


def arguments(channels: int, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "z": jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, channels)), jnp.float32),
        "logsnr": jnp.array([-1.0, 2.0]),
        "text_emb": jnp.asarray(rng.normal(size=(BATCH, LENGTH, DIM)), jnp.float32),
        "text_mask": jnp.array([[True, True, False, False], [True, True, True, False]]),
        "lowres_logsnr": jnp.array([5.0, 1.0]),
    }


def random_like(shapes, seed: int = 0):
    """Parameters that are not zero: the last layer is initialised with zeros."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            rng.normal(size=leaf.shape) / max(np.prod(leaf.shape[:-1]), 2) ** 0.5, jnp.float32
        ),
        shapes,
    )


def build(config: ModelConfig):
    """(apply(params, **arguments), random parameters) of a network."""
    network = MODELS[config.name](config)
    inputs = arguments(6 if config.lowres else 3)
    if not config.lowres:
        inputs["lowres_logsnr"] = None
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), **inputs))["params"]
    params = random_like(partitioning.unbox(shapes))
    return jax.jit(lambda params, inputs: network.apply({"params": params}, **inputs)), params


@pytest.fixture(scope="module", params=MODES, ids="-".join)
def network(request):
    """(run, inputs): an SR network in one of the modes; run(**changes) -> output."""
    name, conditioning, pooling = request.param
    config = dataclasses.replace(
        TINY, name=name, text_conditioning=conditioning, text_pooling=pooling, lowres=True
    )
    apply, params = build(config)
    inputs = arguments(6)
    return lambda **changes: np.asarray(apply(params, {**inputs, **changes})), inputs


def test_output_and_what_it_depends_on(network):
    run, inputs = network
    out = run()
    assert out.shape == (BATCH, SIZE, SIZE, 3) and out.dtype == np.float32
    assert np.isfinite(out).all() and out.std() > 0.01

    changes = {
        "z": inputs["z"].at[:, 0, 0, 0].add(1.0),
        "the low-res image": {"z": inputs["z"].at[:, 3, 3, 5].add(1.0)},
        "logsnr": inputs["logsnr"] + 0.5,
        "lowres_logsnr": inputs["lowres_logsnr"] - 0.5,
        "text_emb": inputs["text_emb"].at[:, 0].multiply(-1.0),
        "text_mask": inputs["text_mask"].at[:, 1].set(False),
    }
    for name, change in changes.items():
        moved = run(**(change if isinstance(change, dict) else {name: change})) - out
        assert (np.abs(moved).max(axis=(1, 2, 3)) > 1e-5).all(), name


@pytest.mark.parametrize(("norm", "invariant"), [("layer", True), ("none", False)])
def test_layer_norm_removes_the_scale_of_the_text(norm, invariant):
    config = dataclasses.replace(TINY, text_conditioning="cross", text_norm=norm)
    apply, params = build(config)
    names = str(jax.tree.structure(params))
    assert ("text_norm" in names) == ("pooling_norm" in names) == invariant
    inputs = {**arguments(3), "lowres_logsnr": None}
    once, twice = (
        np.asarray(apply(params, {**inputs, "text_emb": scale * inputs["text_emb"]}))
        for scale in (1.0, 2.0)
    )
    assert (np.abs(once - twice).max() < 1e-3) == invariant


def test_masked_tokens_are_inert(network):
    run, inputs = network
    other = arguments(6, seed=1)["text_emb"] * 100.0
    text_emb = jnp.where(inputs["text_mask"][..., None], inputs["text_emb"], other)
    np.testing.assert_array_equal(run(text_emb=text_emb), run())


def test_attention_depends_on_positions_only_through_the_position_embedding():
    """Permuting the pixels permutes the output, unless positions are embedded."""
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    swapped = x.reshape(1, 16, 8)[:, ::-1].reshape(x.shape)
    for positions in (False, True):
        config = dataclasses.replace(TINY, position_embedding=positions)
        block = attention.AttentionBlock(config, pixels=True)
        shapes = jax.eval_shape(lambda b=block: b.init(jax.random.key(0), x, None, None))
        params = random_like(partitioning.unbox(shapes["params"]))
        out = block.apply({"params": params}, x, None, None)
        other = block.apply({"params": params}, swapped, None, None)
        other = other.reshape(1, 16, 8)[:, ::-1].reshape(x.shape)
        assert np.allclose(out, other, atol=1e-5) is not positions


def test_images_of_a_batch_are_independent(network):
    run, inputs = network
    changed = {name: value.at[1].set(value[0]) for name, value in inputs.items()}
    np.testing.assert_allclose(run(**changed)[0], run()[0], rtol=1e-5, atol=1e-6)


def test_every_parameter_is_used():
    for name, lowres in [("unet", False), ("efficient_unet", True)]:
        config = dataclasses.replace(TINY, name=name, lowres=lowres, position_embedding=not lowres)
        _, params = build(config)
        inputs = arguments(6 if lowres else 3)
        inputs["lowres_logsnr"] = inputs["lowres_logsnr"] if lowres else None
        network = MODELS[name](config)

        @jax.jit
        def gradient(params, network=network, inputs=inputs):
            target = jnp.linspace(-1.0, 1.0, BATCH * SIZE * SIZE * 3)

            def loss(params):
                return jnp.sum(network.apply({"params": params}, **inputs).ravel() * target)

            return jax.grad(loss)(params)

        unused = [
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params))
            if not jnp.abs(leaf).max() > 0
        ]
        assert not unused, (name, unused)


def test_an_untrained_residual_stage_outputs_the_lowres_image():
    config = dataclasses.replace(TINY, name="efficient_unet", lowres=True, lowres_residual=True)
    apply, params = build(config)
    params["conv_out"] = jax.tree.map(jnp.zeros_like, params["conv_out"])
    inputs = arguments(6)
    np.testing.assert_array_equal(apply(params, inputs), inputs["z"][..., 3:])


@pytest.mark.parametrize(("name", "own"), [("unet", 1.0), ("efficient_unet", 2**-0.5)])
def test_skips_are_scaled_as_the_network_defines_unless_configured(name, own):
    levels = dict.fromkeys(("self_attention", "cross_attention"), (False, False))
    two_levels = dataclasses.replace(
        TINY, name=name, channels=(8, 8), num_res_blocks=(1, 1), strided_stem=(), **levels
    )
    inputs = {**arguments(3), "lowres_logsnr": None}
    outputs = {}
    for scale in (None, 1.0, 2**-0.5):
        apply, params = build(dataclasses.replace(two_levels, skip_scale=scale))
        outputs[scale] = np.asarray(apply(params, inputs))
    np.testing.assert_array_equal(outputs[None], outputs[own])
    assert np.abs(outputs[1.0] - outputs[2**-0.5]).max() > 1e-3


def count(config: ModelConfig, size: int = 16) -> tuple[int, tuple[int, ...]]:
    """Parameters and output shape, without running anything."""
    network = MODELS[config.name](config)
    inputs = {**arguments(6 if config.lowres else 3), "lowres_logsnr": None}
    inputs["z"] = jnp.zeros((BATCH, size, size, inputs["z"].shape[-1]))
    if config.lowres:
        inputs["lowres_logsnr"] = jnp.zeros(BATCH)
    out, variables = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), **inputs))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"])), out.shape


@pytest.mark.parametrize(
    ("conditioning", "pooling", "patch_size"),
    list(itertools.product(["concat", "cross", "none"], ["attention", "mean"], [1, 2])),
)
def test_every_mode_of_two_levels_builds(conditioning, pooling, patch_size):
    for name in MODELS:
        config = dataclasses.replace(
            TINY,
            name=name,
            channels=(8, 16),
            num_res_blocks=(1, 2),
            self_attention=(False, True),
            cross_attention=(True, True),
            strided_stem=(False, True),
            text_conditioning=conditioning,
            text_pooling=pooling,
            patch_size=patch_size,
        )
        assert count(config)[1] == (BATCH, 16, 16, 3)


@pytest.mark.parametrize("name", ["unet", pytest.param("efficient_unet", marks=pytest.mark.slow)])
def test_remat_keeps_less_and_changes_nothing(name):
    """What the forward pass keeps for the backward pass, in bytes; and the gradient."""
    kept, gradients = {}, {}
    for remat in ("none", "blocks", "full"):
        config = dataclasses.replace(
            TINY, name=name, num_res_blocks=(2,), dropout=0.1, remat=remat, dtype="float32"
        )
        network = MODELS[name](config)
        inputs = {**arguments(3), "lowres_logsnr": None}
        shapes = jax.eval_shape(lambda n=network, i=inputs: n.init(jax.random.key(0), **i))
        params = random_like(partitioning.unbox(shapes["params"]))

        def loss(params, network=network, inputs=inputs):
            rngs = {"dropout": jax.random.key(1)}
            out = network.apply({"params": params}, **inputs, train=True, rngs=rngs)
            return jnp.mean(out**2)

        backward = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        kept[remat] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))
        if name == "efficient_unet":
            gradients[remat] = jax.jit(jax.grad(loss))(params)
    assert kept["full"] < kept["blocks"] < kept["none"]
    for remat in ("blocks", "full") if gradients else ():
        pairs = zip(*(jax.tree.leaves(gradients[r]) for r in ("none", remat)), strict=True)
        for expected, got in pairs:
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_attention_on_gpus_goes_to_cudnn_where_it_can():
    shapes = {"half": (4, 64, 2, 64), "odd": (4, 63, 2, 64), "wide": (4, 64, 2, 256)}
    one, odd, wide = (jnp.zeros(shape, jnp.bfloat16) for shape in shapes.values())
    single = one.astype(jnp.float32)
    choose = attention.attention_implementation
    assert choose(one, one, "gpu") == "cudnn"
    for query, key, backend in [
        (one, one, "cpu"),
        (one, one, "tpu"),
        (single, single, "gpu"),
        (one, odd, "gpu"),
        (wide, wide, "gpu"),
    ]:
        assert choose(query, key, backend) == "xla"


def linear(inputs: int, outputs: int, kernel: int = 1) -> int:
    return kernel * kernel * inputs * outputs + outputs


def test_number_of_parameters_of_the_base_unet():
    """ADM's topology counted by hand: one level of 8, embedding 16, text of width 8."""

    def res(inputs, outputs):
        shortcut = linear(inputs, outputs) if inputs != outputs else 0
        norms = 2 * inputs + 2 * outputs
        return (
            norms
            + linear(inputs, outputs, 3)
            + linear(16, 2 * outputs)
            + linear(outputs, outputs, 3)
            + shortcut
        )

    # norm, query, key and value of pixels, key and value of text, output
    attends = 2 * 8 + linear(8, 8) + linear(8, 16) + linear(DIM, 16) + linear(8, 8)
    noise = 2 * linear(16, 16)
    pooling = linear(DIM, 16) + linear(DIM, 32) + linear(16, 16)
    text = 2 * 2 * DIM + pooling
    down = res(8, 8) + attends
    middle = res(8, 8) + attends + res(8, 8)
    up = 2 * (res(16, 8) + attends)
    ends = linear(3, 8, 3) + 2 * 8 + linear(8, 3, 3)
    assert count(TINY)[0] == noise + text + down + middle + up + ends


def convolutions(jaxpr) -> list:
    """Every convolution in a program, those of inner programs too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            found.append(equation)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += convolutions(inner)
    return found


@pytest.mark.parametrize("name", list(MODELS))
def test_bfloat16_is_the_dtype_of_the_work_and_float32_that_of_parameters(name):
    network = MODELS[name](dataclasses.replace(TINY, name=name, dtype="bfloat16"))
    inputs = {**arguments(3), "lowres_logsnr": None}
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), **inputs))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    program = jax.make_jaxpr(lambda v: network.apply(v, **inputs))(variables)
    dtypes = [str(e.invars[0].aval.dtype) for e in convolutions(program.jaxpr)]
    # The last one sees the float32 of the norm before it.
    assert dtypes.count("bfloat16") == len(dtypes) - 1 and len(dtypes) > 5
