"""Names of metrics that one part of a run writes and another one reads."""

MASTER, QUANTIZED = "master", "quantized"
"""What is evaluated at the end: masters rounded to bf16, and quantized weights (QAT)."""
MASTER_AT_SWITCH, PTQ = "master_at_switch", "ptq"
"""The same at the switch."""


def evaluated_state(state: str, serving: str | None = None) -> str:
    """What is evaluated: weights in a state, as a serving computes with them. Without a serving it is the one that was trained."""
    return state if serving is None else f"{state}_{serving}"


def evaluation_metric(name: str, state: str, serving: str | None = None) -> str:
    """The metric of what an evaluation of weights in a state calls `name`: `loss`, or what the loss reports beside it."""
    return f"val/{name}_{evaluated_state(state, serving)}"


VAL_LOSS_MASTER = evaluation_metric("loss", MASTER)
VAL_LOSS_QUANTIZED = evaluation_metric("loss", QUANTIZED)
VAL_LOSS_MASTER_AT_SWITCH = evaluation_metric("loss", MASTER_AT_SWITCH)
VAL_LOSS_PTQ = evaluation_metric("loss", PTQ)

TOKENS_PER_S = "train/tokens_per_s"
PEAK_GIB = "memory/peak_gib"

EXPORT_BYTES = "export/bytes"
EXPORT_BITS_PER_WEIGHT = "export/bits_per_weight"

SQNR_STATISTIC = "sqnr_db"


def statistic_metric(statistic: str) -> str:
    """The metric of a statistic of all quantized weights together. Those of each layer are in layers.csv."""
    return f"quant/{statistic}"


def heat_map_name(statistic: str) -> str:
    """The picture of a statistic of all layers, in loggers that show pictures."""
    return f"heat_maps/{statistic}"


def histogram_name(histogram: str) -> str:
    return f"histograms/{histogram}"


def histograms_by_layer_name(histogram: str) -> str:
    """The picture of the histograms of all layers."""
    return f"histograms/{histogram}_by_layer"


WORST_LAYERS = "worst_layers/table"

SQNR_DB = statistic_metric(SQNR_STATISTIC)
