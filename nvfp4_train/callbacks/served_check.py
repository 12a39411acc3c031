"""Proves, before training begins, that the model computes what the exported model will."""

import torch
from lightning import Callback, Trainer

from nvfp4_train.models.served_check import check_served
from nvfp4_train.models.served_dtype import class_of
from nvfp4_train.module import QATModule


class ServedCheck(Callback):
    """One short sequence of random tokens goes through the training model and through the plain transformers class.

    Raises ValueError, which names the first module that differs. Null it to train without the check.
    """

    def __init__(self, *, tokens: int = 32) -> None:
        if tokens < 2:
            raise ValueError(f"callbacks.served_check.tokens must be at least 2, got {tokens}")
        self.tokens = tokens
        self.outcome: str | None = None
        """What the check has found, in a line."""

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._check(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # The only hook of a run without steps.
        if self.outcome is None:
            self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: QATModule) -> None:
        assert pl_module.model is not None
        config = pl_module.model.config.get_text_config()
        length = min(self.tokens, getattr(config, "max_position_embeddings", None) or self.tokens)
        ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        with pl_module.clock.paused():
            num_modules = check_served(pl_module.model, ids.to(pl_module.device), pl_module.compute_dtype, pl_module.inputs)
        self.outcome = (
            f"the training forward is that of the plain {class_of(pl_module.model).__name__}: {num_modules} modules compared"
            + (", before torch.compile" if pl_module.model_config.compile else "")
        )
        if trainer.is_global_zero:
            print(self.outcome, flush=True)
