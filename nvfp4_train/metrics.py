"""Names of metrics that one part of a run writes and another one reads."""

VAL_LOSS_MASTER = "val/loss_master"
VAL_LOSS_QUANTIZED = "val/loss_quantized"
VAL_LOSS_MASTER_AT_SWITCH = "val/loss_master_at_switch"
VAL_LOSS_PTQ = "val/loss_ptq"

TOKENS_PER_S = "train/tokens_per_s"
PEAK_GIB = "memory/peak_gib"

EXPORT_BYTES = "export/bytes"
EXPORT_BITS_PER_WEIGHT = "export/bits_per_weight"

SQNR_STATISTIC = "sqnr_db"


def statistic_metric(statistic: str, layer: str | None = None) -> str:
    """The metric of a statistic of one layer, or of all quantized weights together."""
    return f"quant/{statistic}" if layer is None else f"quant/{layer}/{statistic}"


SQNR_DB = statistic_metric(SQNR_STATISTIC)
