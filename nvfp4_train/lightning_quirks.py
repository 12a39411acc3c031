"""What reaches into Lightning's internals, seen in lightning 2.6.6. The tests of this file fail where the internals have moved."""

from typing import Any

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


def keep_signal_handlers(trainer: L.Trainer) -> None:
    """Leave signals to the handlers that are there. Lightning's own, which it installs before training starts, end a run on SIGTERM
    as if it had done all its steps.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def drop_sigterm_agreement(trainer: L.Trainer) -> None:
    """Leave out Lightning's own agreement on SIGTERM: a broadcast and a wait for the device before every micro-batch."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def log_finished_step(trainer: L.Trainer) -> None:
    """Log the metrics of a step that an exception ends in the callbacks behind it, as Lightning does after them. Once for a step."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    if progress.total.completed < progress.total.processed:
        trainer._logger_connector.on_batch_end()
        progress.increment_completed()
        trainer._logger_connector.update_train_step_metrics()


def back_to_device(trainer: L.Trainer) -> None:
    """Move the module back to the device that it was made for. Lightning moves it to the CPU before it calls `on_fit_end`, where a run
    without a step to do has all of its work ahead: hours there, and no collective of a GPU.
    """
    trainer.lightning_module.to(trainer.strategy.root_device)


def run_missing_validation(trainer: L.Trainer) -> None:
    """Run the validation of the step of the checkpoint that was restored, if that was saved before the validation or in it.

    Call it when training starts, or at the end of a fit that had nothing left to train. Lightning leaves out such a validation, or
    does the rest of it alone. Where the checkpoint is of the end of training, it also counts the last step twice in its logs.
    """
    loop = trainer.fit_loop.epoch_loop
    if not loop.restarting or trainer.num_training_batches != float("inf"):
        return
    progress: Any = loop.batch_progress
    validated: Any = loop.val_loop.batch_progress
    is_validated = validated.is_last_batch and validated.current.completed == validated.current.ready
    is_missing = progress.total.completed < progress.total.processed or not is_validated
    for count in (progress.total, progress.current):
        count.completed = count.processed
    loop.update_restart_stage()
    # Without training there is no fetcher any more. It is only asked for its class.
    fetcher: Any = trainer.fit_loop._data_fetcher
    is_due = loop._should_check_val_fx(fetcher)
    # Lightning adds the step of a validation behind it.
    loop._batches_that_stepped = trainer.global_step - is_due
    if is_due and is_missing:
        first_loop_iter = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        loop.val_loop.restarting = False
        loop.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first_loop_iter
    loop.val_loop.reset_restart_stage()
