"""Lightning's strategy for FSDP2, with the sizes of the device mesh taken from the run, and checkpoints that every strategy reads."""

from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nvfp4_train.checkpoints import by_name, is_sharded_checkpoint, read_checkpoint


class FullyShardedStrategy(ModelParallelStrategy):
    """Shards masters, gradients and optimizer states over all devices, or over each of `replicate_size` replicas (HSDP).

    The module shards itself in `configure_model`, over `shard_mesh`.
    """

    def __init__(
        self,
        *,
        replicate_size: int = 1,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if replicate_size < 1:
            raise ValueError(f"trainer.strategy.replicate_size must be at least 1, got {replicate_size}")
        self.replicate_size = replicate_size
        self.reshard_after_forward = reshard_after_forward
        self._shard_mesh: DeviceMesh | None = None

    @property
    def shard_mesh(self) -> DeviceMesh:
        """[shard], or [replicate, shard]."""
        if self._shard_mesh is None:
            shape: tuple[int, ...] = (self.world_size,)
            names: tuple[str, ...] = ("shard",)
            if self.replicate_size > 1:
                shape = (self.replicate_size, self.world_size // self.replicate_size)
                names = ("replicate", "shard")
            self._shard_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        return self._shard_mesh

    def setup_environment(self) -> None:
        world_size = self.num_nodes * self.num_processes
        if world_size % self.replicate_size:
            raise ValueError(
                f"trainer.strategy.replicate_size must divide the number of devices, {world_size}, got {self.replicate_size}"
            )
        # Lightning's own defaults are tensor parallel within a node.
        self._data_parallel_size, self._tensor_parallel_size = world_size, 1
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if is_sharded_checkpoint(path):
            return super().load_checkpoint(path, weights_only)
        # Every rank takes its rows of the file. Lightning 2.6 numbers an optimizer's parameters in the order of the model, which
        # is wrong for an optimizer with several groups.
        assert self.model is not None
        checkpoint = read_checkpoint(path)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            set_optimizer_state_dict(self.model, optimizer, by_name(state, ordered), options=options)
        return checkpoint


class AnyCheckpointIO(TorchCheckpointIO):
    """For strategies that write files: reads the folder of a sharded run, too."""

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        if is_sharded_checkpoint(Path(path)):
            return read_checkpoint(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)
