"""Parameters on the devices: of one stage, as a request asks, and of all networks of a cascade."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config
from imagen_jax.inference import adapters, placement
from imagen_jax.inference.batch_size import RESERVE
from imagen_jax.interop.weights import flatten, unflatten
from imagen_jax.parallel import memory, partitioning
from imagen_jax.stages import lora, network
from imagen_jax.stages.lora import Adapter
from imagen_jax.stages.stage import Stage
from imagen_jax.text.encoders import TextEncoder
from imagen_jax.text.frozen_encoder import FrozenEncoder


class StageParams:
    """Parameters that are placed at first use, one array after the other, and then kept.

    Attributes:
      config: of the stage.
    """

    def __init__(self, stage: Stage, loras: Mapping[str, Adapter] = {}):
        """Holds the parameters, usually mapped from their file.

        Args:
          stage: the stage.
          loras: by name, to add to its kernels with the weights of a request.

        Raises:
          WeightsError: a LoRA is of another network.
        """
        for adapter in loras.values():
            lora.check_fits(stage.params, adapter)
        self.config = stage.config
        self._params, self._loras = stage.params, loras
        self._bytes: dict[str, int] = {}
        self._key: Any = None
        self._placed: Any = None

    def bytes(self, config: Config) -> int:
        """Bytes of all parameters in the dtype of `config`."""
        dtype = config.model.dtype
        if dtype not in self._bytes:
            self._bytes[dtype] = sum(
                math.prod(np.shape(leaf)) * placement.param_dtype(np.shape(leaf), dtype).itemsize
                for leaf in jax.tree.leaves(self._params)
            )
        return self._bytes[dtype]

    def get(self, config: Config) -> Any:
        """The parameters on the devices of this process; others than the last ones replace them.

        Args:
          config: of `placement.with_placement`: LoRAs, their scale, dtype and mesh. For a guide,
            that of the stage that it guides.
        """
        mesh = placement.make_mesh(config.sampling)
        key = (config.model.dtype, mesh, self._weights(config.sampling))
        if key != self._key:
            self.release()  # Not beside the next ones.
            self._placed, self._key = self._place(*key), key
        return self._placed

    def _weights(self, settings: SamplingConfig) -> tuple[tuple[str, float], ...]:
        """The LoRAs of a request that have an effect, with their weights."""
        if not self._loras:
            return ()
        loaded = [f"{name}@1" for name in self._loras]
        chosen = adapters.weights(settings.loras, loaded, "sampling.loras")
        scaled = ((name, weight * settings.lora_scale) for name, weight in chosen.items())
        return tuple((name, weight) for name, weight in scaled if weight)

    def release(self) -> None:
        """Frees the devices' memory."""
        self._placed = self._key = None

    def _place(self, dtype: str, mesh: Any, weights: Sequence[tuple[str, float]]) -> Any:
        params = self._params
        if weights:
            weighted = [(self._loras[name], weight) for name, weight in weights]
            params = lora.with_adapters(params, weighted)
        flat = flatten(params)
        if mesh is None:
            replicated = partitioning.replicated(partitioning.local_mesh())
            shardings = dict.fromkeys(flat, replicated)
        else:
            boxed = network.boxed_shapes(self.config)
            shardings = flatten(partitioning.param_shardings(boxed, mesh))
        placed = {}
        for path, array in flat.items():
            wanted = placement.param_dtype(np.shape(array), dtype)
            if array.dtype != wanted:
                array = array.astype(wanted)
            # Blocks, so that queued transfers do not hold all parameters in host memory.
            placed[path] = jax.block_until_ready(jax.device_put(array, shardings[path]))
        return unflatten(placed)


class Networks:
    """All networks of a cascade: which are on the devices together, and how they are sharded.

    Attributes:
      keep: "all" together, or "one" at a time.
    """

    def __init__(
        self,
        stages: Sequence[StageParams],
        guides: Sequence[StageParams | None],
        encoder: TextEncoder | None,
        keep: Literal["auto", "all", "one"],
    ):
        """Decides from the default settings of the stages, and shards a large text encoder.

        Args:
          stages: base first.
          guides: of each stage; None: no guide.
          encoder: the text encoder; None: there is none.
          keep: "auto": all where their parameters have room.
        """
        self._stages, self._guides = stages, guides
        self._encoder = encoder if isinstance(encoder, FrozenEncoder) else None
        self._devices = memory.local_devices()
        # As a small batch on a CPU would notice the checks of new configurations.
        self._placed = functools.lru_cache(maxsize=64)(self._place)
        platform = self._devices.platform
        sizes = self._sizes([placement.with_dtype(stage.config, platform) for stage in stages])
        self.keep: placement.Keep = (
            placement.choose_keep(sizes, self._devices) if keep == "auto" else keep
        )
        fsdp = placement.choose_fsdp(sizes[-1], sizes, self.keep, self._devices)
        if self._encoder and fsdp > 1:
            devices = jax.local_devices()
            self._encoder.shard_over(partitioning.sampling_mesh(devices, fsdp=fsdp, height=1))

    def _sizes(self, configs: Sequence[Config]) -> list[int]:
        """Bytes of the parameters of each stage with its guide, and of the text encoder."""
        sizes = [
            stage.bytes(config) + (guide.bytes(config) if guide else 0)
            for stage, guide, config in zip(self._stages, self._guides, configs, strict=True)
        ]
        return [*sizes, self._encoder.bytes() if self._encoder else 0]

    def placed(self, configs: Sequence[Config]) -> list[Config]:
        """Configurations of the stages in which dtype and mesh are decided."""
        return list(self._placed(*configs))

    def _place(self, *given: Config) -> list[Config]:
        configs = [placement.with_dtype(config, self._devices.platform) for config in given]
        return placement.with_placement(configs, self._sizes(configs), self.keep, self._devices)

    def room(self, configs: Sequence[Config], index: int) -> int:
        """Bytes of a device that activations of a stage may take.

        Args:
          configs: from `placed`.
          index: of the stage.
        """
        sizes = self._sizes(configs)
        shares = [config.sampling.fsdp or 1 for config in configs]
        shares.append(self._encoder.shards if self._encoder else 1)
        held = [size / share for size, share in zip(sizes, shares, strict=True)]
        resident = sum(held) if self.keep == "all" else held[index]
        return int((1.0 - RESERVE) * self._devices.bytes - resident)

    @contextlib.contextmanager
    def using(self, index: int) -> Iterator[None]:
        """Frees the parameters of a stage and its guide at the end, unless all are kept.

        Also where sampling is cancelled or fails: the next request starts with another network.
        """
        try:
            yield
        finally:
            for params in (self._stages[index], self._guides[index]):
                if params and self.keep == "one":
                    params.release()

    def release_encoder(self) -> None:
        """Frees the parameters of the text encoder, unless all are kept."""
        if self._encoder and self.keep == "one":
            self._encoder.release()
