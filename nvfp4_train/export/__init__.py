"""Writers of packed NVFP4 model folders, and the check that re-reads them. Needs neither Lightning nor Hydra."""

from nvfp4_train.export.compressed_tensors import ExportReport, export_compressed_tensors
from nvfp4_train.export.verify import ExportError, VerifyReport, verify_export

__all__ = ["ExportError", "ExportReport", "VerifyReport", "export_compressed_tensors", "verify_export"]
