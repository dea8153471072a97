"""What is left of what was forgotten, and what was lost: measures, each with an interval, and the report."""

from expunge.audit.page import Section, write_page
from expunge.audit.report import Report, Row, audit, compare
from expunge.audit.subject import Reading, Subject

__all__ = ["Reading", "Report", "Row", "Section", "Subject", "audit", "compare", "write_page"]
