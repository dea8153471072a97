"""expunge: make a trained model forget, with evidence."""

from expunge import methods
from expunge.combine import OneSidedProjection
from expunge.core import Case, Data, MissingExtra, Refused, Request, RunFailed, chain
from expunge.data.sources import as_data
from expunge.data.split import split
from expunge.descend import Descend, Guard
from expunge.run import Outcome, load_weights, save_weights, unlearn
from expunge.scope import Scope, edit
from expunge.tasks.classification import Classification
from expunge.version import __version__

__all__ = ["Case", "Classification", "Data", "Descend", "Guard", "MissingExtra", "OneSidedProjection", "Outcome", "Refused",
           "Request", "RunFailed", "Scope", "__version__", "as_data", "chain", "edit", "load_weights", "methods", "save_weights",
           "split", "unlearn"]
