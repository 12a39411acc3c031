"""What a run knows of its model when it exports, for the model card."""

from collections.abc import Mapping, Sequence

from lightning import Trainer

from nvfp4_train.export.card import RunFacts, Stage
from nvfp4_train.losses.distillation import DistillationLoss
from nvfp4_train.metrics import MASTER, MASTER_AT_SWITCH, PTQ, QUANTIZED, evaluation_metric
from nvfp4_train.module import QATModule
from nvfp4_train.quant.policy import SERVINGS

COLUMNS = ("loss", "kl", "top1_agreement")


def run_facts(trainer: Trainer, pl_module: QATModule, command: Sequence[str] = ()) -> RunFacts:
    """The facts at the end of a run, whose results have been reported."""
    quant, model = pl_module.quant_config, pl_module.model
    assert model is not None
    steps = trainer.global_step
    data = getattr(trainer.datamodule, "config", None)  # type: ignore[attr-defined]
    tokens = None
    if data is not None:
        tokens = steps * trainer.accumulate_grad_batches * trainer.world_size * data.batch_size * data.seq_len
    is_equalized = quant.enabled and quant.alpha is not None and quant.calibration.sequences
    return RunFacts(
        base_model=getattr(model.config, "name_or_path", None) or None,
        command=command,
        method=_method(pl_module, steps),
        equalization=f"exponent {quant.alpha:g}, folded into the weights" if is_equalized else None,
        steps=steps,
        start_step=quant.start_step if quant.enabled else None,
        tokens=tokens,
        stages=stages(pl_module.results, is_trained=steps > 0),
    )


def stages(results: Mapping[str, float], *, is_trained: bool) -> list[Stage]:
    """Masters, and quantized weights under each serving, at the switch and at the end; without training those are one."""
    when = [("at the switch", MASTER_AT_SWITCH, PTQ, "PTQ")]
    if is_trained:
        when.append(("at the end", MASTER, QUANTIZED, "trained"))
    found = []
    for moment, masters, quantized, how in when:
        found.append(Stage(label=f"masters in bf16, {moment}", numbers=_numbers(results, masters)))
        of_servings = [
            Stage(label=f"{how}, {moment}, {serving.upper()}", numbers=_numbers(results, quantized, serving))
            for serving in SERVINGS
        ]
        # A model that was not calibrated knows one serving, by no name.
        if not any(stage.numbers for stage in of_servings):
            of_servings = [Stage(label=f"{how}, {moment}", numbers=_numbers(results, quantized))]
        found += of_servings
    return [stage for stage in found if stage.numbers]


def _numbers(results: Mapping[str, float], state: str, serving: str | None = None) -> dict[str, float]:
    keys = {name: evaluation_metric(name, state, serving) for name in COLUMNS}
    return {name: results[key] for name, key in keys.items() if key in results}


def _method(pl_module: QATModule, steps: int) -> str:
    quant = pl_module.quant_config
    if steps == 0:
        return "PTQ: calibrated and quantized, without training"
    if not quant.enabled or steps <= quant.start_step:
        return "PTQ after training without quantization"
    if isinstance(pl_module.loss, DistillationLoss):
        return "QAD: trained in NVFP4 to give the tokens that the original gives (quantization-aware distillation)"
    return "QAT: trained in NVFP4 (quantization-aware training)"
