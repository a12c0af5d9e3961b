"""Where parameters are in sampling, how many images fit, and what an error says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config import bounds
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.config.text import T5Config, TextConfig
from imagen_jax.inference import adapters, batch_size, batches, cascade, placement, stage_params
from imagen_jax.inference.batch_size import OutOfMemoryError
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.request import with_settings
from imagen_jax.interop import weights
from imagen_jax.models import t5
from imagen_jax.parallel import liveness, memory, partitioning
from imagen_jax.parallel.memory import Devices
from imagen_jax.stages.lora import Factors
from imagen_jax.stages.stage import Stage
from imagen_jax.text.frozen_encoder import FrozenEncoder
from imagen_jax.text.vocabulary import ByteVocabulary

TEXTS = {
    "text_emb": np.random.default_rng(0).normal(size=(6, 4, 8)).astype(np.float32),
    "text_mask": np.arange(4) < np.array([[1], [3], [4], [2], [4], [1]]),
}


@pytest.fixture(scope="module")
def stages(base_config, sr_config, random_params):
    return [Stage(config, random_params(config)) for config in (base_config, sr_config)]


@pytest.mark.parametrize(
    ("sizes", "keep", "fsdp"),
    [
        ([10, 20, 20], "all", [1, 1]),  # Half of a device's 100 bytes.
        ([10, 20, 21], "all", [8, 8]),
        ([200, 100, 100], "all", [8, 8]),
        ([10, 391, 0], "one", [1, 8]),  # Half of all devices' bytes: 400.
        ([10, 390, 0], "all", [8, 8]),
    ],
)
def test_parameters_take_half_of_the_memory_where_they_can(base_config, sizes, keep, fsdp):
    devices = Devices("tpu", 8, 100)
    assert placement.choose_keep(sizes, devices) == keep
    configs = [placement.with_dtype(base_config, "tpu")] * 2
    placed = placement.with_placement(configs, sizes, keep, devices)
    assert [config.sampling.fsdp for config in placed] == fsdp
    for fields, expected in (({"fsdp": 2}, 2), ({"height": 4}, 1)):
        own = dataclasses.replace(base_config.sampling, **fields)
        configs[0] = dataclasses.replace(configs[0], sampling=own)
        placed = placement.with_placement(configs, sizes, keep, devices)
        assert placed[0].sampling.fsdp == expected


def test_height_and_fsdp_exclude_each_other(base_config):
    with pytest.raises(ConfigError, match="sampling.fsdp=2 must be 1 with sampling.height"):
        dataclasses.replace(base_config.sampling, fsdp=2, height=2)


def test_the_dtype_is_that_of_the_platform_unless_it_is_given(base_config):
    assert placement.with_dtype(base_config, "cpu").model.dtype == "float32"
    for platform in ("gpu", "tpu"):
        assert placement.with_dtype(base_config, platform).model.dtype == "bfloat16"
    own = dataclasses.replace(base_config.sampling, dtype="float32")
    given = dataclasses.replace(base_config, sampling=own)
    assert placement.with_dtype(given, "tpu").model.dtype == "float32"


def test_a_mesh_that_the_devices_do_not_have(base_config):
    sampling = dataclasses.replace(base_config.sampling, fsdp=3)
    with pytest.raises(ConfigError, match=r"fsdp\*height=3\*1 must divide .* 1; try fsdp=1$"):
        placement.make_mesh(sampling)
    sampling = dataclasses.replace(base_config.sampling, fsdp=1, height=2)
    with pytest.raises(ConfigError, match=r"fsdp\*height=1\*2 must divide .* height=1$"):
        placement.make_mesh(sampling)


def test_parameters_are_cast_once_and_norms_stay_float32(stages):
    params = stage_params.StageParams(stages[0])
    config = placement.with_dtype(stages[0].config, "tpu")
    config = placement.with_placement([config], [0], "all", Devices("tpu", 1, 100))[0]
    placed = params.get(config)
    for leaf, given in zip(jax.tree.leaves(placed), jax.tree.leaves(stages[0].params), strict=True):
        assert leaf.dtype == (jnp.bfloat16 if given.ndim > 1 else jnp.float32)
        np.testing.assert_array_equal(leaf, given.astype(leaf.dtype))
    assert params.bytes(config) == sum(leaf.nbytes for leaf in jax.tree.leaves(placed))
    assert params.get(config) is placed
    again = params.get(placement.with_dtype(stages[0].config, "cpu"))
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype("float32")}


def test_a_network_in_bfloat16_samples_alike_with_cast_parameters(stages):
    """A network casts its kernels itself: casting them before changes nothing but memory."""
    base, _ = stages
    config = dataclasses.replace(base.config, model=dataclasses.replace(base.config.model))
    half = {"base": {"dtype": "bfloat16"}}
    images = [
        Cascade([Stage(config, params)]).sample_floats(stage_settings=half, **TEXTS)
        for params in (base.params, jax.tree.map(_rounded, base.params))
    ]
    np.testing.assert_array_equal(*images)
    full = Cascade([base]).sample_floats(**TEXTS)
    assert np.abs(full - images[0]).max() > 0 and np.abs(full - images[0]).mean() < 0.1


def _rounded(array: np.ndarray) -> np.ndarray:
    return array.astype(jnp.bfloat16).astype(np.float32) if array.ndim > 1 else array


def test_liveness_of_a_program_by_hand():
    def program(x):
        a = x @ x
        b = jnp.sin(a)  # a and b
        c = a + b  # a, b and c
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.cos(y @ y), c).sum()

    traced = jax.make_jaxpr(program)(jnp.ones((256, 256)))
    assert liveness.peak_bytes(traced.jaxpr) // 256**2 == 3 * 4


def test_activations_grow_with_the_batch_and_bound_those_of_the_compiler(stages):
    base, _ = stages
    found = {}
    for count in (2, 4):
        shapes = [
            jax.ShapeDtypeStruct((count, *TEXTS[name].shape[1:]), TEXTS[name].dtype)
            for name in TEXTS
        ]
        key = jax.eval_shape(lambda: jax.random.key(0))
        traced = batches.stage_sampler.sample_stage.trace(
            base.params,
            base.config,
            batches.stage_sampler.Text(*shapes),
            jax.ShapeDtypeStruct((count,), key.dtype),
        )
        found[count] = liveness.peak_bytes(traced.jaxpr.jaxpr)
        used = traced.lower().compile().memory_analysis().temp_size_in_bytes
        assert used / 4 < found[count]
    assert 1.8 < found[4] / found[2] < 2.05


def test_a_batch_is_what_has_room_and_the_images_are_those_of_small_requests(stages, monkeypatch):
    sizes, needs = [], []
    fitting, peak_bytes = batches.fitting, liveness.peak_bytes

    def recording(*arguments, **options):
        sizes.append(fitting(*arguments, **options))
        return sizes[-1]

    def needed(jaxpr):
        needs.append(peak_bytes(jaxpr))
        return needs[-1]

    monkeypatch.setattr(batch_size, "NEEDS", {})
    monkeypatch.setattr(batches, "fitting", recording)
    monkeypatch.setattr(batch_size.liveness, "peak_bytes", needed)
    whole = Cascade(stages).sample_stages(seed=1, **TEXTS)
    assert sizes == [6, 6]
    counted = len(needs)
    Cascade(stages).sample_stages(seed=2, **TEXTS)
    assert sizes == [6] * 4 and len(needs) == counted  # Once for each program.
    # Room for 2.4 images of the second stage beside its parameters.
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(stages[1].params))
    size = int((0.4 * max(needs) + held) / (1 - batch_size.RESERVE)) + 1
    monkeypatch.setattr(memory, "local_devices", lambda: Devices("cpu", 1, size))
    sizes.clear()
    small = Cascade(stages).sample_stages(seed=1, **TEXTS)
    assert sizes[1] == 2 <= sizes[0] < 6
    for ours, expected in zip(small, whole, strict=True):
        assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 1
    # In parts of the same size, bit for bit.
    own = {"base": {"batch_size": 2}, "sr": {"batch_size": 2}}
    large = Cascade(stages).sample(seed=1, stage_settings=own, **TEXTS)
    for first in (0, 2, 4):
        rows = slice(first, first + 2)
        part = Cascade(stages).sample(
            seed=1,
            prompt_indices=[first, first + 1],
            **{name: array[rows] for name, array in TEXTS.items()},
        )
        np.testing.assert_array_equal(part, large[rows])


@pytest.mark.parametrize(
    ("size", "parts", "dtype", "fsdp", "remedy"),
    [
        (8, 1, "float32", 1, "batch_size=4"),
        (24, 8, "float32", 1, "batch_size=8"),
        (8, 8, "float32", 1, 'dtype="bfloat16"'),
        (8, 8, "bfloat16", 1, "fsdp=8"),
        (8, 8, "bfloat16", 8, "fsdp=1 and sampling.height=8"),
    ],
)
def test_out_of_memory_names_stage_need_and_the_next_remedy(
    stages, size, parts, dtype, fsdp, remedy
):
    config = stages[1].config
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype=dtype),
        sampling=dataclasses.replace(config.sampling, fsdp=fsdp, dtype=dtype),
    )
    params = partitioning.replicate(stages[1].params)
    error = batch_size.out_of_memory(
        Stage(config, params),
        size,
        parts,
        Devices("tpu", 8, 2**34),
        RuntimeError("RESOURCE_EXHAUSTED: Used 20.1G of 15.7G hbm.\nmore"),
    )
    message = str(error)
    assert f"stage 'sr': out of memory with {size} images at a time on 8 devices" in message
    assert "Used 20.1G of 15.7G hbm" in message and "\n" not in message
    assert f"set sampling.{remedy} for the stage" in message


@pytest.mark.parametrize(("count", "height"), [(1, 1), (8, 8)])
def test_out_of_memory_where_no_field_helps(stages, count, height):
    """One device, or an image on all of them, in bfloat16 and one by one."""
    config = placement.with_dtype(stages[1].config, "gpu")
    sampling = dataclasses.replace(config.sampling, height=height)
    stage = Stage(dataclasses.replace(config, sampling=sampling), {})
    devices = Devices("gpu", count, 2**34)
    error = batch_size.out_of_memory(stage, 1, 1, devices, RuntimeError("RESOURCE_EXHAUSTED"))
    assert str(error).endswith("; use more devices, or devices with more memory")


@pytest.fixture
def one_at_a_time(stages, monkeypatch):
    """A device that has no room for the parameters of both stages."""
    size = sum(leaf.nbytes for stage in stages for leaf in jax.tree.leaves(stage.params))
    monkeypatch.setattr(memory, "local_devices", lambda: Devices("cpu", 1, size))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_request_that_is_cancelled_leaves_no_parameters(stages, one_at_a_time, stage):
    chain = Cascade(stages)
    assert chain.keep == "one"

    def cancel(progress):
        if progress.stage_index == stage:
            assert [params._placed is not None for params in chain._params] == [
                index == stage for index in (0, 1)
            ]
            raise InterruptedError

    with pytest.raises(InterruptedError):
        chain.sample(on_progress=cancel, **TEXTS)
    assert all(params._placed is None for params in chain._params)


def test_the_text_encoder_is_read_once_per_request(stages, one_at_a_time, monkeypatch):
    shape = T5Config(vocab_size=384, emb_dim=8, num_layers=1, num_heads=1, head_dim=8, mlp_dim=8)
    rng, reads = np.random.default_rng(0), []

    def tensor(path, leaf):
        array = rng.normal(size=leaf.shape).astype(np.float32)
        return weights.Tensor(array.shape, lambda: reads.append(path) or array)

    tensors = {p: tensor(p, x) for p, x in weights.flatten(t5.parameter_shapes(shape)).items()}
    text = TextConfig(max_len=4)
    encoder = FrozenEncoder("bytes", shape, tensors, vocabulary=ByteVocabulary(), config=text)

    def sampled(stage, inputs, **options):
        assert encoder._params is None
        size = stage.config.data.image_size
        return np.zeros((len(inputs.keys), size, size, 3), np.float32)

    monkeypatch.setattr(cascade, "sample_batches", sampled)
    Cascade(stages, encoder).sample(["a", "b"], negative_prompts=["c", "d"])
    assert sorted(reads) == sorted(tensors)


def test_a_lora_without_a_weight_has_the_weight_one(stages):
    name = next(p for p, x in weights.flatten(stages[0].params).items() if x.ndim == 2)
    rows, columns = weights.flatten(stages[0].params)[name].shape
    pair = Factors(np.ones((rows, 1), np.float32), np.ones((1, columns), np.float32))
    params = stage_params.StageParams(stages[0], {"cat": {name.removesuffix("/kernel"): pair}})
    base = adapters.with_loras([stages[0].config], [adapters.LoraSpec("", "runs/cat", 0.5)])
    for chosen, weight in (["cat"], 1), (["cat@0.25"], 0.25), ([], 0):
        (config,) = with_settings(base, {"base": {"loras": chosen}})
        added = weights.flatten(params.get(config))[name] - weights.flatten(stages[0].params)[name]
        np.testing.assert_allclose(added, np.full((rows, columns), weight), atol=1e-6)


def test_a_program_that_does_not_fit_is_that_error(stages, monkeypatch):
    init, run = batches.programs()

    class Run:
        trace = staticmethod(run.trace)

        def __call__(self, *arguments):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    monkeypatch.setattr(batches, "programs", lambda: (init, Run()))
    with pytest.raises(OutOfMemoryError, match=r"stage 'base': .* set sampling.batch_size=3"):
        Cascade(stages).sample(**TEXTS)


def test_equal_calls_check_no_configuration_again(stages, monkeypatch):
    """A check takes about half a millisecond, which a batch of one image notices."""
    chain, request = Cascade(stages), {name: value[:1] for name, value in TEXTS.items()}
    settings = {"base": {"guidance_weight": 3.0}}
    chain.sample(**request)
    chain.sample(stage_settings=settings, **request)
    checked = []
    check = bounds.check
    monkeypatch.setattr(bounds, "check", lambda *args: (checked.append(args), check(*args)))
    chain.sample(**request)
    assert not checked
    # A setting is a new configuration of its stage alone.
    chain.sample(stage_settings=settings, **request)
    assert {section.name for section, *_ in checked if isinstance(section, Config)} == {"base"}
