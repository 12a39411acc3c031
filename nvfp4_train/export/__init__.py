"""Writers of packed NVFP4 model folders, and the check that re-reads them. Needs neither Lightning nor Hydra."""

from nvfp4_train.export.readers.base import ExportError
from nvfp4_train.export.verify import VerifyReport, verify_export
from nvfp4_train.export.writer import ExportReport, export_compressed_tensors, export_model

__all__ = ["ExportError", "ExportReport", "VerifyReport", "export_compressed_tensors", "export_model", "verify_export"]
