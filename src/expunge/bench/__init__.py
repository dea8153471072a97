"""Benchmarks: methods x requests x seeds on one suite, each judged against models retrained without what was forgotten."""

from expunge.bench.runner import bench
from expunge.bench.suite_file import RESULTS, SUITES, BenchSpec, suite_file

__all__ = ["RESULTS", "SUITES", "BenchSpec", "bench", "suite_file"]
