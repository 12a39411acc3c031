"""Served weights of a replicated model, quantized from its masters under the store's scales, and compared with the store's weights."""

from torch import Tensor
from transformers import PreTrainedModel

from nvfp4_train.export.masters import FromMasters
from nvfp4_train.quant.served import SERVED_DTYPE
from nvfp4_train.quant.store import WeightStore


class FromStore(FromMasters):
    """Weights of a model on one device, or of a rank of DDP, as the last update of its store left them.

    Raises ValueError as `FromMasters` does.
    """

    def __init__(self, model: PreTrainedModel, store: WeightStore) -> None:
        self._store = store
        super().__init__(model.state_dict(), store.manifest, model.config, store.state.state_dict())

    def compute_weight(self, name: str) -> Tensor:
        return self._store.compute_weight(name).to(SERVED_DTYPE)

    def _find_global_scales(self) -> dict[str, Tensor]:
        self._store.check_finite()
        scales = self._store.global_scale.cpu()
        return {name: scales[self._store.slots(name)] for name in self.manifest.names}
