"""Plans of programs compiled for four virtual CPU devices.

A separate program, because the number of devices is fixed when JAX starts. Arguments: CONFIG_JSON
[search]; `search` adds the search over train steps. Prints a JSON object.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config, MeshConfig
from imagen_jax.parallel import hlo, partitioning, topology
from imagen_jax.planning import plan
from imagen_jax.planning.search import search_batch, search_train
from imagen_jax.training import initial_state
from imagen_jax.training.optimizer import make_optimizer


def collectives_of_a_loop() -> list[hlo.Collective]:
    """Five sums of [16, 16] over four devices in a loop, then [32, 16] gathered once."""
    mesh = partitioning.make_mesh(MeshConfig(data=4))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def program(x):
        again = lambda total, _: (jnp.sin(x.T @ (x @ total)), None)  # noqa: E731
        total, _ = jax.lax.scan(again, jnp.eye(16), length=5)
        replicated = partitioning.replicated(mesh)
        return total, jax.lax.with_sharding_constraint(x * 2, replicated)

    x = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=rows)
    return hlo.collectives(jax.jit(program).lower(x).compile().as_text())


def bytes_on_first_device(config: Config) -> int:
    """Bytes of state and batch on the first device."""
    mesh = partitioning.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    create, _ = initial_state.abstract_state(config, optimizer, mesh)
    sharding = partitioning.batch_sharding(mesh)
    batch = {
        name: jax.device_put(jnp.zeros(s.shape, s.dtype), sharding)
        for name, s in plan.batch_shapes(config).items()
    }
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves((create(), batch))
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )


def with_batch(config: Config, size: int) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_disable_most_optimizations", True)
    config = overrides.from_json(sys.argv[1])
    config = dataclasses.replace(with_batch(config, 16), mesh=MeshConfig(fsdp=2))
    here = topology.this_machine()
    lines: list[str] = []

    sample = plan.compile_program(plan.sample_program(config, here, 4), here)
    per_image = sample.peak - sample.program.params * 4
    room = here._replace(hbm=sample.peak + 2 * per_image)
    largest = search_batch(lambda n: plan.sample_program(config, room, n), room, {}, lines.append)
    alone = dataclasses.replace(config, mesh=MeshConfig(data=4))
    data_parallel = plan.compile_program(plan.sample_program(alone, here, 4), here)
    result = {
        "data_parallel": data_parallel.as_json(),
        "loop": [c._asdict() for c in collectives_of_a_loop()],
        "sample": sample.as_json(),
        "largest": largest.as_json(),
        "largest_batch": largest.program.batch,
    }
    if "search" in sys.argv[2:]:
        whole = plan.compile_program(plan.train_program(config, here), here)
        half = plan.compile_program(plan.train_program(with_batch(config, 8), here), here)
        tight = here._replace(hbm=(whole.peak + half.peak) // 2)
        # On CPUs neither accumulation, unrolled there, nor recomputation saves memory.
        found = search_train(with_batch(config, 8), tight, {}, lines.append)
        result |= {
            "train": whole.as_json(),
            "compiler_flops": whole.compiled.cost_analysis()["flops"],
            "arguments": bytes_on_first_device(config),
            "found": found.as_json(),
            "found_batch": found.program.batch,
            "found_remat": found.program.config.model.remat,
            "found_accumulation": found.program.config.train.accumulation,
        }
    print(json.dumps(result | {"lines": lines}))


if __name__ == "__main__":
    main()
