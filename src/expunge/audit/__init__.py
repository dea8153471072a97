"""What is left of what was forgotten, and what was lost: measures, each with an interval, and the report."""

import sys
import types
from typing import Any

from expunge.audit.page import Section, write_page
from expunge.audit.report import Report, Row, audit, compare
from expunge.audit.subject import Reading, Subject

__all__ = ["Reading", "Report", "Row", "Section", "Subject", "audit", "compare", "write_page"]


class _Callable(types.ModuleType):
    """The package is the folder of the measures and, as ``expunge.audit(subject)``, the audit itself."""

    def __call__(self, subject: Subject, **options: Any) -> Report:
        return audit(subject, **options)


sys.modules[__name__].__class__ = _Callable
