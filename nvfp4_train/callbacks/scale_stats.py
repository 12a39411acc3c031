"""Logs what the quantizer does to every weight."""

from collections.abc import Mapping

from nvfp4_train.callbacks.layer_statistics import LayerStatistics
from nvfp4_train.quant.statistics import BlockScales, GlobalAmax, Sqnr, Statistic


class ScaleStats(LayerStatistics):
    """Largest magnitudes, the distribution of block scales and the SQNR; `statistics` adds others under keys of their own.

    A key that is null leaves out the statistic of that key: `global_amax`, `block_scales` or `sqnr`.
    """

    def __init__(
        self,
        *,
        statistics: Mapping[str, Statistic | None] | None = None,
        every_n_steps: int = 100,
        per_layer: bool = True,
        draw_every: int = 10,
        run_dir: str | None = None,
    ) -> None:
        own = {"global_amax": GlobalAmax(), "block_scales": BlockScales(), "sqnr": Sqnr()}
        super().__init__(
            statistics=own | dict(statistics or {}),
            every_n_steps=every_n_steps,
            per_layer=per_layer,
            draw_every=draw_every,
            run_dir=run_dir,
        )
