"""Changes to Lightning's internals, seen in lightning 2.6.6. The tests of this file fail where the internals have moved."""

import lightning as L


def rewind_to_last_step(trainer: L.Trainer) -> None:
    """Set the trainer's count of micro-batches to those that the optimizer steps so far took.

    A checkpoint from the middle of an accumulation window lacks the gradients so far. Lightning would finish the window with its
    remaining micro-batches alone. With the count set back, it does the whole window again.
    """
    done = trainer.global_step * trainer.accumulate_grad_batches
    progress = trainer.fit_loop.epoch_loop.batch_progress
    unfinished = progress.total.ready - done
    if unfinished:
        for count in (progress.total, progress.current):
            target = count.ready - unfinished
            for stage in ("ready", "started", "processed", "completed"):
                setattr(count, stage, target)


def drop_sigterm_agreement(trainer: L.Trainer) -> None:
    """Leave out Lightning's own agreement on SIGTERM: a broadcast and a wait for the device before every micro-batch."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
