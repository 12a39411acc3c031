"""Names of metrics that one part of a run writes and another one reads."""

MASTER_AT_SWITCH, PTQ, MASTER, QUANTIZED = "master_at_switch", "ptq", "master", "quantized"
"""What held-out metrics are of: the masters and the quantized model when quantization begins, and both at the end."""


def val_metric(name: str, of: str, serving: str | None = None) -> str:
    """A held-out metric (`loss`, `kl`, ...) of one of the above; without a serving it is of the one that was trained."""
    return f"val/{name}_{of}" if serving is None else f"val/{name}_{of}_{serving}"


VAL_LOSS_MASTER = val_metric("loss", MASTER)
VAL_LOSS_QUANTIZED = val_metric("loss", QUANTIZED)
VAL_LOSS_MASTER_AT_SWITCH = val_metric("loss", MASTER_AT_SWITCH)
VAL_LOSS_PTQ = val_metric("loss", PTQ)

TOKENS_PER_S = "train/tokens_per_s"
PEAK_GIB = "memory/peak_gib"

EXPORT_BYTES = "export/bytes"
EXPORT_BITS_PER_WEIGHT = "export/bits_per_weight"

SQNR_STATISTIC = "sqnr_db"


def statistic_metric(statistic: str, layer: str | None = None) -> str:
    """The metric of a statistic of one layer, or of all quantized weights together."""
    return f"quant/{statistic}" if layer is None else f"quant/{layer}/{statistic}"


SQNR_DB = statistic_metric(SQNR_STATISTIC)
