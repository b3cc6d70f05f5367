"""summary.json of a workdir as one page to look at, report.html, and as curves of TensorBoard."""

from guided_distill.report.page import write_report
from guided_distill.report.tensorboard import tensorboard_rows, write_tensorboard

__all__ = ["tensorboard_rows", "write_report", "write_tensorboard"]
