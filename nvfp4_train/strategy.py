"""Lightning's strategies for FSDP2, with the sizes of the device mesh taken from the run, and DDP; both read all checkpoints."""

from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from torch import distributed
from torch.distributed.checkpoint import CheckpointException, async_save, load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from nvfp4_train.checkpoints import (
    SafePlanner,
    SafeReader,
    by_name,
    by_number,
    check_same_weights,
    first_failure,
    is_sharded_checkpoint,
    read_checkpoint,
    read_rest,
    saved_shapes,
    shapes,
)
from nvfp4_train.disk import DiskError
from nvfp4_train.saving import ShardedWriter, save_file


class FullyShardedStrategy(ModelParallelStrategy):
    """Shards masters, gradients and optimizer states over all devices, or over each of `replicate_size` replicas (HSDP).

    The module shards itself in `configure_model`, over `shard_mesh`. With `async_checkpoint` a checkpoint is copied to host memory
    and written while training goes on. One is written at a time: the next one and the end of training wait for it.
    """

    def __init__(
        self,
        *,
        replicate_size: int = 1,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = True,
        async_checkpoint: bool = False,
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
        if async_checkpoint and not save_distributed_checkpoint:
            raise ValueError(
                "trainer.strategy.async_checkpoint needs save_distributed_checkpoint=true: a file is written at once"
            )
        self.replicate_size = replicate_size
        self.reshard_after_forward = reshard_after_forward
        self.async_checkpoint = async_checkpoint
        self._in_flight: tuple[ShardedWriter, Future[Any]] | None = None
        """The checkpoint that is being written."""
        self._replaced: list[str | Path] = []
        """Checkpoints to delete when the one in flight is complete."""
        self._background_group: distributed.ProcessGroup | None = None
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

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if not self._save_distributed_checkpoint:
            _save_from_rank_zero(self, partial(super().save_checkpoint, checkpoint, filepath, storage_options))
            return
        assert storage_options is None
        self.finish_checkpoint()
        writer = ShardedWriter(Path(self.broadcast(filepath)), checkpoint.get("global_step"))
        state = {"state_dict": checkpoint.pop("state_dict")}
        state |= {f"optimizer_{index}": values for index, values in enumerate(checkpoint.pop("optimizer_states", []))}
        failure = None
        if self.is_global_zero:
            try:
                writer.start(checkpoint)
            except Exception as error:
                failure = writer.failure(error)
                failure.__cause__ = error
        _raise_on_all_ranks(self, failure)
        assert self.lightning_module is not None
        try:
            # A caller outside of training expects a checkpoint when this returns.
            if self.async_checkpoint and self.lightning_module.trainer.training:
                if self._background_group is None:
                    # Threads must not share a group, and NCCL takes no CPU tensors.
                    self._background_group = distributed.new_group(backend="gloo", timeout=self._timeout)
                future = async_save(state, storage_writer=writer, process_group=self._background_group)
                self._in_flight = writer, cast("Future[Any]", future)
            else:
                save(state, storage_writer=writer)
        except CheckpointException as error:
            raise writer.failure(error) from error

    def finish_checkpoint(self) -> None:
        """Wait until the checkpoint in flight is complete, then delete those that it replaces.

        Raises what `ShardedWriter.failure` gives where it failed.
        """
        if self._in_flight is None:
            return
        (writer, future), self._in_flight = self._in_flight, None
        replaced, self._replaced = self._replaced, []
        try:
            future.result()
        # CheckpointException derives from BaseException; `except Exception` does not catch it.
        except (Exception, CheckpointException) as error:
            raise writer.failure(error) from error
        for earlier in replaced:
            super().remove_checkpoint(earlier)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self._in_flight is not None:
            self._replaced.append(filepath)
        else:
            super().remove_checkpoint(filepath)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._in_flight is not None and self._in_flight[1].done():
            self.finish_checkpoint()

    def on_train_end(self) -> None:
        self.finish_checkpoint()

    # Lightning copies the whole state dict to host memory. `save` copies a tensor at a time; `async_save` makes its own copy.
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return get_model_state_dict(self.model) if self._save_distributed_checkpoint else super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.model is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        if self._save_distributed_checkpoint:
            return get_optimizer_state_dict(self.model, optimizer)
        # Lightning 2.6 numbers parameters in the order of the model, not of the optimizer. Only the first rank has the state.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        return by_number(state) if state else state

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None and self.lightning_module is not None
        if is_sharded_checkpoint(path):
            # As Lightning does, but safely; see `checkpoints`.
            state: dict[str, Any] = {"state_dict": get_model_state_dict(self.model)}
            for index, optimizer in enumerate(self.optimizers):
                state[f"optimizer_{index}"] = get_optimizer_state_dict(self.model, optimizer)
            # torch.distributed.checkpoint passes over weights that only the checkpoint has.
            check_same_weights(path, saved_shapes(path), shapes(state["state_dict"]))
            try:
                load(state, storage_reader=SafeReader(path), planner=SafePlanner())
            except CheckpointException as error:
                raise ValueError(f"the checkpoint {path} could not be loaded: {first_failure(error)}") from error
            self.model.load_state_dict(state["state_dict"], strict=self.lightning_module.strict_loading)
            for index, optimizer in enumerate(self.optimizers):
                set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{index}"])
            return read_rest(path)
        # Every rank takes its rows of the file. Lightning's own way numbers parameters wrongly, as in `optimizer_state`.
        checkpoint = read_checkpoint(path)
        weights = checkpoint.pop("state_dict")
        check_same_weights(path, shapes(weights), shapes(get_model_state_dict(self.model)))
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, weights, options=options)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        # An evaluation has no optimizers.
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=bool(self.optimizers)):
            ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            set_optimizer_state_dict(self.model, optimizer, by_name(state, ordered), options=options)
        return checkpoint


def timeout_of(trainer: Trainer) -> timedelta | None:
    """How long a collective of the trainer's strategy waits for a rank; None for PyTorch's default."""
    return getattr(trainer.strategy, "_timeout", None)


class ReplicatedStrategy(DDPStrategy):
    """Lightning's DDP, in which every rank hears that a checkpoint could not be written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        _save_from_rank_zero(self, partial(super().save_checkpoint, checkpoint, filepath, storage_options))


def _save_from_rank_zero(strategy: ParallelStrategy, save: Callable[[], None]) -> None:
    """Save, on all ranks, what rank 0 alone writes. DiskError on every rank where the disk does not take it."""
    failure = None
    try:
        save()
    except DiskError as error:
        failure = error
    _raise_on_all_ranks(strategy, failure)


def _raise_on_all_ranks(strategy: ParallelStrategy, failure: Exception | None) -> None:
    """Raise the failure of rank 0, if there is one, on every rank: the others would wait for it."""
    if (of_first := strategy.broadcast(failure)) is not None:
        raise failure or of_first


class AnyCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO of strategies that write files. A file is complete or does not exist. Reads the folder of a sharded run, too."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            # Lightning writes to the folder for temporary files first, which may be on another, smaller disk.
            save_file(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        if is_sharded_checkpoint(Path(path)):
            return read_checkpoint(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)
